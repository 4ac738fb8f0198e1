// y[R, out] = x[R, in] w[index][out, in]^T for few rows and each of several weights, whose low-rank updates are added at
// rows with an open gate. Weights are read once, in place in their stack, in their own format. Built and called by
// few_rows.py, whose XLA path is the oracle of the tests.
//
// A row's result does not depend on the other rows: every sum is over 16 lanes in the order of the inputs, then over
// the lanes. Threads take chunks of outputs until none is left, so a late one delays nobody.
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kOutputs = 4, kChunkBytes = 64 << 10;  // outputs whose weights are decoded at a time; of a thread
constexpr int kTileOutputs = kHasManyRegisters ? 4 : 2, kTileRows = kHasManyRegisters ? 6 : 2;  // sums in registers

// How weights are stored, how many bytes before their use they are fetched, and how many meet their inputs at a time.
struct F32 {
  using Stored = float;
  using Input = float;
  static constexpr int64_t kAhead = 4096, kStep = kLanes;
  static Floats Of(const float* w, int64_t = kStep) { return At(w); }
  static void Add(Floats& sum, Floats weight, Floats input) { sum += weight * input; }
};
struct Bf16 : F32 {
  using Stored = uint16_t;
  static Floats Of(const uint16_t* w, int64_t = kStep) { return At(w); }
  static Floats Of(const float* x, int64_t = kStep) { return At(x); }
};
#ifdef __AVX512BF16__
// Weights and inputs in bfloat16: one instruction adds two products to each lane.
struct Bf16Pairs {
  using Stored = uint16_t;
  using Input = uint16_t;
  static constexpr int64_t kAhead = 4096, kStep = 2 * kLanes;
  static __m512bh Of(const uint16_t* w, int64_t left = kStep) {
    return (__m512bh)_mm512_maskz_loadu_epi16(left >= kStep ? ~0u : 0xffffu, w);
  }
  static void Add(Floats& sum, __m512bh weight, __m512bh input) {
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, weight, input);
  }
};
constexpr bool kHasPairs = true;
#else
using Bf16Pairs = Bf16;
constexpr bool kHasPairs = false;
#endif
template <typename Format>
struct InCache : Format {
  static constexpr int64_t kAhead = 0;
};

// The sums of the lanes of four vectors, halves together.
inline Four Totals(const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
#ifdef __AVX512F__
  const auto quarter = [](Floats x) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  };
  const __m128 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  const __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
  const __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
  return (Four)_mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq));
#else
  Floats all[4] = {a, b, c, d};
  Four totals;
  for (int n = 0; n < 4; ++n) {
    for (int width = kLanes / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) all[n][i] += all[n][i + width];
    totals[n] = all[n][0];
  }
  return totals;
#endif
}

alignas(64) constexpr float kNf4Levels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
alignas(64) constexpr float kInt4Levels[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

enum Format : int64_t { kFloat32, kBfloat16, kNf4, kInt4, kInt8 };
enum Scales : int64_t { kPlain, kHalf, kNested };

// The codes of one weight [out, in] and what scales them; a group of inputs shares a scale.
struct Quantised {
  int64_t format, scales, group, groups;
  bool rounds;  // to bfloat16, as a layer in bfloat16 does
  const uint8_t* codes;
  const void* scale;    // [out, groups] float32 or bfloat16, or bytes that index `map`
  const float* limits;  // [ceil(out * groups / 256)]
  const float* map;     // [256]
  float offset;

  float Scale(int64_t i) const {
    if (scales == kPlain) return static_cast<const float*>(scale)[i];
    if (scales == kHalf) {
      uint32_t bits = uint32_t{static_cast<const uint16_t*>(scale)[i]} << 16;
      return Load<float>(&bits);
    }
    float product = map[static_cast<const uint8_t*>(scale)[i]] * limits[i / 256];
    asm volatile("" : "+m"(product));  // two roundings, as bitsandbytes has them
    return product + offset;
  }

  // Row `row` as float32, or as bfloat16.
  template <typename To>
  void Decode(int64_t row, To* to) const {
    for (int64_t g = 0; g < groups; ++g, to += group) {
      const float by = Scale(row * groups + g);
      if (format == kInt8) {
        const uint8_t* from = codes + (row * groups + g) * group;
        for (int64_t i = 0; i < group; i += kLanes) {
          const Floats value = __builtin_convertvector(Widened(Load<Signed>(from + i)), Floats) * by;
          Put(rounds && sizeof(To) == 4 ? Rounded(value) : value, to + i);
        }
        continue;
      }
      const int64_t half = group / 2;  // a byte has elements i and i + half
      const Floats levels = At(format == kNf4 ? kNf4Levels : kInt4Levels) * by;
      const Table<To> table(rounds ? Rounded(levels) : levels);
      for (int64_t i = 0; i < half; i += kLanes)
        table.Pick(Load<Bytes>(codes + (row * groups + g) * half + i), to + i, to + half + i);
    }
  }

  // The values of the 16 codes of a group.
  template <typename To>
  struct Table {
    explicit Table(Floats values) { Put(values, of); }
    // What the low four bits, and the high four, of 16 bytes stand for.
    void Pick(Bytes codes, To* low, To* high) const {
#ifdef __AVX512VBMI__
      if constexpr (sizeof(To) == 2) {
        const __m256i table = Load<__m256i>(of), index = _mm256_cvtepu8_epi16((__m128i)codes);
        Store(_mm256_permutexvar_epi16(index, table), low);
        Store(_mm256_permutexvar_epi16(_mm256_srli_epi16(index, 4), table), high);
        return;
      }
#endif
#ifdef __AVX512F__
      if constexpr (sizeof(To) == 4) {
        const __m512i index = (__m512i)Widened(codes);
        Store(_mm512_permutexvar_ps(index, Load<__m512>(of)), low);
        Store(_mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), Load<__m512>(of)), high);
        return;
      }
#endif
      for (int i = 0; i < kLanes; ++i) low[i] = of[codes[i] & 15], high[i] = of[codes[i] >> 4];
    }
    alignas(64) To of[16];
  };
};

// The rows of a float32 matrix, to be decoded like codes.
struct Matrix {
  const float* values;
  int64_t width;

  template <typename To>
  void Decode(int64_t row, To* to) const {
    for (int64_t i = 0; i < width; i += kLanes) Put(At(values + row * width + i), to + i);
  }
};

// `rank` float32 as whole vectors, padded with zeros.
template <typename To>
void Padded(const float* from, int64_t rank, To* to) {
  for (int64_t i = 0; i < rank; i += kLanes) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, from + i, std::min(kLanes, rank - i) * sizeof(float));
    Put(At(lanes), to + i);
  }
}

// Products of one format. A low-rank update lengthens the sums: by `low`, what its first factor gave, times `up`.
struct Product {
  int64_t rows, width, outputs;
  const void* x;  // [rows, width], of Format::Input
  void* y;        // [rows, outputs], bfloat16 or float32
  bool is_half = false;
  int64_t rank = 0, padded = 0;
  const float* up = nullptr;  // [outputs, rank]
  const void* low = nullptr;  // [rows, padded], of Format::Input; zero where the gate is shut

  template <typename Format, int O, int R>
  static void Add(Floats (&sums)[O][R], const typename Format::Stored* w, const typename Format::Input* x,
                  int64_t width) {
    for (int64_t i = 0; i < width; i += Format::kStep) {
      if constexpr (Format::kAhead > 0) {  // in the order of memory, which the processor does not see in that of O rows
        const char* ahead = reinterpret_cast<const char*>(w + i * O) + Format::kAhead;
        for (size_t line = 0; line < O * Format::kStep * sizeof(*w); line += 64) __builtin_prefetch(ahead + line);
      }
      decltype(Format::Of(w)) weight[O];
      for (int o = 0; o < O; ++o) weight[o] = Format::Of(w + o * width + i, width - i);
      for (int r = 0; r < R; ++r) {
        const auto input = Format::Of(x + r * width + i, width - i);
        for (int o = 0; o < O; ++o) Format::Add(sums[o][r], weight[o], input);
      }
    }
  }

  // Outputs `output` ... of rows `row` ...; the weights, and `ups`, of the first of them begin there.
  template <typename Format, int O, int R>
  void Tile(const typename Format::Stored* w, const typename Format::Stored* ups, int64_t output, int64_t row) const {
    using Input = typename Format::Input;
    Floats sums[O][R] = {};
    Add<Format>(sums, w, static_cast<const Input*>(x) + row * width, width);
    if (rank) Add<InCache<Format>>(sums, ups, static_cast<const Input*>(low) + row * padded, padded);
    for (int r = 0; r < R; ++r) {
      const Four totals = Totals(sums[0][r], sums[1 % O][r], sums[2 % O][r], sums[3 % O][r]);
      const int64_t at = (row + r) * outputs + output;
      if (is_half) {
        const auto halves = Narrow(totals);
        std::memcpy(static_cast<uint16_t*>(y) + at, &halves, O * sizeof(uint16_t));
      } else {
        std::memcpy(static_cast<float*>(y) + at, &totals, O * sizeof(float));
      }
    }
  }

  template <typename Format, int R>
  void Tiles(const typename Format::Stored* w, const typename Format::Stored* ups, int64_t output, int64_t count,
             int64_t row) const {
    constexpr int O = kTileOutputs;
    int64_t o = 0;
    for (; o + O <= count; o += O) Tile<Format, O, R>(w + o * width, ups + o * padded, output + o, row);
    for (; o < count; ++o) Tile<Format, 1, R>(w + o * width, ups + o * padded, output + o, row);
  }

  // Outputs `output` ... of all rows: `count` of them, at most `kOutputs`, whose weights begin at `w`.
  template <typename Format>
  void Outputs(const typename Format::Stored* w, typename Format::Stored* ups, int64_t output, int64_t count) const {
    for (int64_t o = 0; rank && o < count; ++o) Padded(up + (output + o) * rank, rank, ups + o * padded);
    Evenly<kTileRows>(rows, [&](int64_t row, auto in_registers) {
      if (row == 0)
        Tiles<Format, in_registers()>(w, ups, output, count, row);
      else
        Tiles<InCache<Format>, in_registers()>(w, ups, output, count, row);
    });
  }

  // Outputs `first` ... `last` - 1 with weights that are stored so.
  template <typename Format>
  void Dense(const typename Format::Stored* w, int64_t first, int64_t last) const {
    std::vector<typename Format::Stored> ups(kOutputs * padded);
    for (int64_t output = first; output < last; output += kOutputs)
      Outputs<Format>(w + output * width, ups.data(), output, std::min(kOutputs, last - output));
  }

  // The same with weights that `w` decodes.
  template <typename Format, typename Source>
  void Decoded(const Source& w, int64_t first, int64_t last) const {
    std::vector<typename Format::Stored> decoded(kOutputs * width), ups(kOutputs * padded);
    for (int64_t output = first; output < last; output += kOutputs) {
      const int64_t count = std::min(kOutputs, last - output);
      for (int64_t o = 0; o < count; ++o) w.Decode(output + o, decoded.data() + o * width);
      Outputs<InCache<Format>>(decoded.data(), ups.data(), output, count);
    }
  }
};

// Which rows have the low-rank update: of a row one bool, or one for each inner value.
struct Gate {
  const bool* open;
  int64_t apart;

  bool Is(int64_t row, int64_t i) const { return open[row * apart + (apart > 1 ? i : 0)]; }
  bool Any(int64_t row) const { return std::any_of(open + row * apart, open + (row + 1) * apart, [](bool is) { return is; }); }
};

// One of the weights that share the inputs.
struct Weight {
  int64_t format;
  const void* dense;
  Quantised codes;
  const float* down;  // [rank, in], of the low-rank update
  Product product;
  std::vector<char> low;

  // What the first factor gives, times `scaling`, at the rows whose gate is open.
  template <typename Format>
  void Lower(ffi::ThreadPool pool, Gate gate, float scaling) {
    using Input = typename Format::Input;
    const int64_t width = product.width, rank = product.rank;
    low.assign(product.rows * product.padded * sizeof(Input), 0);
    product.low = low.data();
    std::vector<int64_t> open;
    for (int64_t row = 0; row < product.rows; ++row)
      if (gate.Any(row)) open.push_back(row);
    const int64_t count = open.size();
    std::vector<Input> x(count * width);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(&x[i * width], static_cast<const Input*>(product.x) + open[i] * width, width * sizeof(Input));
    std::vector<float> given(count * rank);
    const Product lowering{count, width, rank, x.data(), given.data()};
    const Matrix matrix{down, width};
    const int64_t chunk = std::max<int64_t>(kOutputs, kChunkBytes / (width * sizeof(float)) / kOutputs * kOutputs);
    InChunks(pool, rank, chunk, [&lowering, &matrix](int64_t first, int64_t last) {
      lowering.Decoded<std::conditional_t<sizeof(Input) == 2, Format, F32>>(matrix, first, last);
    });
    for (int64_t i = 0; i < count; ++i) {
      float* own = &given[i * rank];
      for (int64_t r = 0; r < rank; ++r) own[r] = gate.Is(open[i], r) ? own[r] * scaling : 0.0f;
      Padded(own, rank, reinterpret_cast<Input*>(low.data()) + open[i] * product.padded);
    }
  }

  void Run(int64_t first, int64_t last, bool pairs) const {
    if (format == kFloat32)
      product.Dense<F32>(static_cast<const float*>(dense), first, last);
    else if (format == kBfloat16 && pairs)
      product.Dense<Bf16Pairs>(static_cast<const uint16_t*>(dense), first, last);
    else if (format == kBfloat16)
      product.Dense<Bf16>(static_cast<const uint16_t*>(dense), first, last);
    else if (pairs)
      product.Decoded<Bf16Pairs>(codes, first, last);
    else
      product.Decoded<F32>(codes, first, last);
  }

  // Outputs that a thread takes at a time.
  int64_t Chunk() const {
    if (format != kFloat32 && format != kBfloat16) return 4 * kOutputs;
    const int64_t bytes = product.width * (format == kFloat32 ? sizeof(float) : sizeof(uint16_t));
    return std::max<int64_t>(kOutputs, kChunkBytes / bytes / kOutputs * kOutputs);
  }
};

using Attribute = ffi::Span<const int64_t>;

// Attributes have a number for each weight; `leaves` are the parts of each, then the factors of its update if it has
// a rank. `y` has a result for each.
ffi::Error FewRows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::PRED> gate,
                   ffi::RemainingArgs leaves, ffi::RemainingRets y, Attribute formats, Attribute scales,
                   Attribute groups, Attribute ranks, float scaling) {
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1], layer = index.typed_data()[0];
  const bool is_half = x.element_type() == ffi::BF16;
  std::vector<float> wide;
  const void* x32 = x.untyped_data();
  if (is_half && (!kHasPairs || std::count(formats.begin(), formats.end(), kFloat32))) {
    wide.resize(rows * width);
    for (int64_t i = 0; i < rows * width; i += kLanes) Put(At(static_cast<const uint16_t*>(x.untyped_data()) + i), &wide[i]);
    x32 = wide.data();
  }
  std::vector<Weight> weights(formats.size());
  struct Job {
    const Weight* weight;
    int64_t first, last;
    bool pairs;
  };
  std::vector<Job> jobs;
  size_t next = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto result = y.get<ffi::AnyBuffer>(i);
    if (result.has_error()) return result.error();
    const bool is_quantised = formats[i] != kFloat32 && formats[i] != kBfloat16;
    const size_t count = 1 + is_quantised * (scales[i] == kNested ? 4 : 1) + 2 * (ranks[i] > 0);
    std::vector<ffi::AnyBuffer> parts;
    for (size_t part = 0; part < count; ++part) {
      auto leaf = leaves.get<ffi::AnyBuffer>(next++);
      if (leaf.has_error()) return leaf.error();
      if (layer < 0 || layer >= leaf->dimensions()[0]) return ffi::Error::InvalidArgument("no such layer");
      parts.push_back(*leaf);
    }
    Weight& weight = weights[i];
    const bool pairs = kHasPairs && is_half && formats[i] != kFloat32;
    const bool gives_half = (*result)->element_type() == ffi::BF16;
    weight.format = formats[i];
    weight.product = {rows, width, (*result)->dimensions()[1], pairs ? x.untyped_data() : x32, (*result)->untyped_data(), gives_half};
    if (is_quantised) {
      Quantised& w = weight.codes = {formats[i], scales[i], groups[i], width / groups[i], is_half, Layer<uint8_t>(parts[0], layer)};
      if (scales[i] == kPlain) w.scale = Layer<float>(parts[1], layer);
      if (scales[i] == kHalf) w.scale = Layer<uint16_t>(parts[1], layer);
      if (scales[i] == kNested) {
        w.scale = Layer<uint8_t>(parts[1], layer);
        w.limits = Layer<float>(parts[2], layer);
        w.offset = *Layer<float>(parts[3], layer);
        w.map = Layer<float>(parts[4], layer);
      }
    } else {
      weight.dense = formats[i] == kFloat32 ? (const void*)Layer<float>(parts[0], layer) : Layer<uint16_t>(parts[0], layer);
    }
    if (ranks[i] > 0) {
      weight.product.rank = ranks[i];
      weight.product.padded = (ranks[i] + kLanes - 1) / kLanes * kLanes;
      weight.down = Layer<float>(parts[count - 2], layer);
      weight.product.up = Layer<float>(parts[count - 1], layer);
      const Gate open{gate.typed_data(), gate.dimensions()[1]};
      if (pairs)
        weight.Lower<Bf16Pairs>(pool, open, scaling);
      else
        weight.Lower<F32>(pool, open, scaling);
    }
    const int64_t outputs = weight.product.outputs, chunk = weight.Chunk();
    for (int64_t first = 0; first < outputs; first += chunk)
      jobs.push_back({&weight, first, std::min(outputs, first + chunk), pairs});
  }
  InChunks(pool, jobs.size(), 1, [jobs = jobs.data()](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) jobs[i].weight->Run(jobs[i].first, jobs[i].last, jobs[i].pairs);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(difflm_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<ffi::Span<const int64_t>>("scales")
                                  .Attr<ffi::Span<const int64_t>>("groups")
                                  .Attr<ffi::Span<const int64_t>>("ranks")
                                  .Attr<float>("scaling"));
