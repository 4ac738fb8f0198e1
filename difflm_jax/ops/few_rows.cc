// y[R, out] = x[R, in] w[index][out, in]^T for few rows: weights are read once, in place in their stack, in their own
// format. Built and called by few_rows.py, whose XLA path is the oracle of the tests.
//
// A row's result does not depend on the other rows: every sum is over 16 lanes in the order of the inputs, then over
// the lanes. Threads take chunks of outputs until none is left, so a late one delays nobody.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int8_t Signed __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16, kOutputs = 4, kChunkBytes = 64 << 10;
constexpr float kUnseen = -std::numeric_limits<float>::infinity();  // the score of a key that is not seen

template <typename To, typename From>
inline To Load(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof(To));
  return to;
}

inline Floats Splat(float x) { return Floats{} + x; }

// The lanes of bfloat16 as float32, and float32 rounded to the nearest bfloat16 (finite numbers).
inline Floats Wide(Halves x) { return (Floats)(__builtin_convertvector(x, Bits) << 16); }
inline Floats Rounded(Floats x) {
  Bits bits = (Bits)x;
  return (Floats)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

// How weights are stored, how many bytes before their use they are fetched, and how many meet their inputs at a time.
struct F32 {
  using Stored = float;
  using Input = float;
  static constexpr int64_t kAhead = 4096, kStep = kLanes;
  static Floats At(const float* w, int64_t = kStep) { return Load<Floats>(w); }
  static void Add(Floats& sum, Floats weight, Floats input) { sum += weight * input; }
};
struct Bf16 {
  using Stored = uint16_t;
  using Input = float;
  static constexpr int64_t kAhead = 4096, kStep = kLanes;
  static Floats At(const uint16_t* w, int64_t = kStep) { return Wide(Load<Halves>(w)); }
  static Floats At(const float* x, int64_t = kStep) { return Load<Floats>(x); }
  static void Add(Floats& sum, Floats weight, Floats input) { sum += weight * input; }
};
#ifdef __AVX512BF16__
// Weights and inputs in bfloat16: one instruction adds two products to each lane.
struct Bf16Pairs {
  using Stored = uint16_t;
  using Input = uint16_t;
  static constexpr int64_t kAhead = 4096, kStep = 2 * kLanes;
  static __m512bh At(const uint16_t* w, int64_t left = kStep) {
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

// The sum of the lanes, halves together.
inline float Total(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
#endif
}

alignas(64) constexpr float kLevels[16] = {
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
    volatile float product = map[static_cast<const uint8_t*>(scale)[i]] * limits[i / 256];
    return product + offset;  // two roundings, as bitsandbytes has them
  }

  Floats Values(Ints codes) const {
    if (format == kInt4) return __builtin_convertvector(codes & 15, Floats) - 8.0f;
#ifdef __AVX512F__
    return (Floats)_mm512_permutexvar_ps((__m512i)codes, _mm512_load_ps(kLevels));  // reads the low four bits
#else
    Floats levels;
    for (int i = 0; i < kLanes; ++i) levels[i] = kLevels[codes[i] & 15];
    return levels;
#endif
  }

  void Put(Floats values, float by, float* to) const {
    values *= by;
    if (rounds) values = Rounded(values);
    std::memcpy(to, &values, sizeof values);
  }

  void Put(Floats values, float by, uint16_t* to) const {
    const Halves halves = __builtin_convertvector((Bits)Rounded(values * by) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }

  // Row `row` as float32, or as bfloat16.
  template <typename To>
  void Decode(int64_t row, To* to) const {
    for (int64_t g = 0; g < groups; ++g, to += group) {
      float by = Scale(row * groups + g);
      if (format == kInt8) {
        const uint8_t* from = codes + (row * groups + g) * group;
        for (int64_t i = 0; i < group; i += kLanes)
          Put(__builtin_convertvector(__builtin_convertvector(Load<Signed>(from + i), Ints), Floats), by, to + i);
        continue;
      }
      const int64_t half = group / 2;  // a byte has elements i and i + half
      const uint8_t* from = codes + (row * groups + g) * half;
      for (int64_t i = 0; i < half; i += kLanes) {
        Ints pair = __builtin_convertvector(Load<Bytes>(from + i), Ints);
        Put(Values(pair), by, to + i);
        Put(Values(pair >> 4), by, to + half + i);
      }
    }
  }
};

// Calls `run` with the numbers of rows that fit into registers together, as a template argument, and the first row.
template <typename F>
void ByRows(int64_t rows, F run) {
  int64_t row = 0;
  for (; rows - row >= 8; row += 8) run(std::integral_constant<int, 8>(), row);
  if (rows - row >= 4) run(std::integral_constant<int, 4>(), row), row += 4;
  if (rows - row >= 2) run(std::integral_constant<int, 2>(), row), row += 2;
  if (rows - row >= 1) run(std::integral_constant<int, 1>(), row);
}

struct Product {
  int64_t rows, width, outputs;
  const void* x;  // [rows, width], of Format::Input
  float* y;

  // Outputs `output` ... of rows `row` ...; `w` is the weight's row of the first of them.
  template <typename Format, int O, int R>
  void Tile(const typename Format::Stored* w, int64_t output, int64_t row) const {
    const auto* inputs = static_cast<const typename Format::Input*>(x) + row * width;
    Floats sums[O][R] = {};
    for (int64_t i = 0; i < width; i += Format::kStep) {
      if constexpr (Format::kAhead > 0) {  // in the order of memory, which the processor does not see in that of O rows
        const char* ahead = reinterpret_cast<const char*>(w + i * O) + Format::kAhead;
        for (size_t line = 0; line < O * Format::kStep * sizeof(*w); line += 64) __builtin_prefetch(ahead + line);
      }
      decltype(Format::At(w)) weight[O];
      for (int o = 0; o < O; ++o) weight[o] = Format::At(w + o * width + i, width - i);
      for (int r = 0; r < R; ++r) {
        const auto input = Format::At(inputs + r * width + i, width - i);
        for (int o = 0; o < O; ++o) Format::Add(sums[o][r], weight[o], input);
      }
    }
    for (int o = 0; o < O; ++o)
      for (int r = 0; r < R; ++r) y[(row + r) * outputs + output + o] = Total(sums[o][r]);
  }

  // Outputs `output` ... of all rows: `count` of them, at most `kOutputs`, whose weights begin at `w`.
  template <typename Format>
  void Outputs(const typename Format::Stored* w, int64_t output, int64_t count) const {
    ByRows(rows, [&](auto in_registers, int64_t row) {
      constexpr int R = in_registers(), O = R <= 2 ? 1 : 2;
      int64_t o = 0;
      for (; o + O <= count; o += O) Tile<Format, O, R>(w + o * width, output + o, row);
      for (; o < count; ++o) Tile<Format, 1, R>(w + o * width, output + o, row);
    });
  }
};

// Calls `part(first, last)` for chunks of 0 .. count - 1 on the threads of the pool and on this one. A helper that
// starts when all chunks are taken touches nothing.
template <typename F>
void InChunks(ffi::ThreadPool pool, int64_t count, int64_t chunk, F part) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  struct State {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, chunks, chunk, count, part] {
    int64_t own = 0, next;
    while ((next = state->taken.fetch_add(1)) < chunks) part(next * chunk, std::min(count, (next + 1) * chunk)), ++own;
    state->done.fetch_add(own, std::memory_order_release);
  };
  const int64_t helpers = std::min(pool.num_threads(), chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  for (int turns = 0; state->done.load(std::memory_order_acquire) < chunks; ++turns)
    if (turns > 1000) std::this_thread::yield();  // a helper has lost its core
}

template <typename Format>
void Dense(ffi::ThreadPool pool, Product product, const typename Format::Stored* w) {
  const int64_t chunk = std::max<int64_t>(kOutputs, kChunkBytes / (product.width * sizeof(*w)) / kOutputs * kOutputs);
  InChunks(pool, product.outputs, chunk, [product, w](int64_t first, int64_t last) {
    for (int64_t output = first; output < last; output += kOutputs)
      product.Outputs<Format>(w + output * product.width, output, std::min(kOutputs, last - output));
  });
}

template <typename Format>
void Decoded(ffi::ThreadPool pool, Product product, Quantised w) {
  InChunks(pool, product.outputs, 4 * kOutputs, [product, w](int64_t first, int64_t last) {
    std::vector<typename Format::Stored> decoded(kOutputs * product.width);
    for (int64_t output = first; output < last; output += kOutputs) {
      const int64_t count = std::min(kOutputs, last - output);
      for (int64_t o = 0; o < count; ++o) w.Decode(output + o, decoded.data() + o * product.width);
      product.Outputs<InCache<Format>>(decoded.data(), output, count);
    }
  });
}

template <typename T>
const T* Layer(const ffi::AnyBuffer& stack, int64_t index) {
  return static_cast<const T*>(stack.untyped_data()) + index * (stack.element_count() / stack.dimensions()[0]);
}

ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> index,
                   ffi::RemainingArgs leaves, ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t format, int64_t scales,
                   int64_t group, bool rounds) {
  const auto rows = x.dimensions()[0], width = x.dimensions()[1];
  Product product{rows, width, y->dimensions()[1], x.typed_data(), y->typed_data()};
  std::vector<ffi::AnyBuffer> parts;
  for (size_t i = 0; i < leaves.size(); ++i) {
    auto part = leaves.get<ffi::AnyBuffer>(i);
    if (part.has_error()) return part.error();
    parts.push_back(*part);
  }
  const int64_t layer = index.typed_data()[0];
  if (layer < 0 || layer >= parts[0].dimensions()[0]) return ffi::Error::InvalidArgument("no such layer");
  const bool pairs = kHasPairs && rounds && format != kFloat32;
  std::vector<uint16_t> halves(pairs ? rows * width : 0);
  if (pairs) {  // the inputs have bfloat16 values
    for (int64_t i = 0; i < rows * width; ++i) halves[i] = Load<uint32_t>(x.typed_data() + i) >> 16;
    product.x = halves.data();
  }
  if (format == kFloat32) {
    Dense<F32>(pool, product, Layer<float>(parts[0], layer));
  } else if (format == kBfloat16 && pairs) {
    Dense<Bf16Pairs>(pool, product, Layer<uint16_t>(parts[0], layer));
  } else if (format == kBfloat16) {
    Dense<Bf16>(pool, product, Layer<uint16_t>(parts[0], layer));
  } else {
    Quantised w{format, scales, group, width / group, rounds, Layer<uint8_t>(parts[0], layer)};
    if (scales == kPlain) w.scale = Layer<float>(parts[1], layer);
    if (scales == kHalf) w.scale = Layer<uint16_t>(parts[1], layer);
    if (scales == kNested) {
      w.scale = Layer<uint8_t>(parts[1], layer);
      w.limits = Layer<float>(parts[2], layer);
      w.offset = *Layer<float>(parts[3], layer);
      w.map = Layer<float>(parts[4], layer);
    }
    if (pairs)
      Decoded<Bf16Pairs>(pool, product, w);
    else
      Decoded<F32>(pool, product, w);
  }
  return ffi::Error::Success();
}

// e^x for x <= 0, to the last bits of a float: 2^n times a polynomial of the rest. NaN stays NaN.
inline Floats Exp(Floats x) {
  x = x < -87.0f ? Splat(-87.0f) : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // truncated: the nearest, as x <= 0
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats y = Splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + c;
  y = y * r * r + r + 1.0f;
  return (Floats)((Ints)y + (n << 23));
}

struct Attention {
  int64_t batch, length, heads, kv_heads, columns, head_dim;
  float scale, softcap;
  const float *q, *own_k, *own_v;  // [B, T, H, E], [B, T, K, E]
  const bool* mask;                // [B, T, S + T]
  float* y;                        // [B, T, H, E]

  // The queries of row `b` that read key head `k`; `k_` and `v` are [B, K, S, E].
  template <typename Format>
  void Head(const typename Format::Stored* k_, const typename Format::Stored* v, int64_t b, int64_t k,
            std::vector<float>& scores) const {
    const int64_t group = heads / kv_heads, keys = columns + length, width = (keys + kLanes - 1) / kLanes * kLanes;
    const auto* column_k = k_ + (b * kv_heads + k) * columns * head_dim;
    const auto* column_v = v + (b * kv_heads + k) * columns * head_dim;
    const auto own = [&](const float* x, int64_t s) { return x + ((b * length + s) * kv_heads + k) * head_dim; };
    scores.resize(width);
    for (int64_t t = 0; t < length; ++t) {
      const bool* sees = mask + (b * length + t) * keys;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t place = ((b * length + t) * heads + k * group + g) * head_dim;
        const float* query = q + place;
        float largest = kUnseen;
        std::fill(scores.begin(), scores.end(), kUnseen);
        for (int64_t s = 0; s < keys; ++s) {
          if (!sees[s]) continue;
          float score = s < columns ? Inner<Format>(query, column_k + s * head_dim)
                                    : Inner<F32>(query, own(own_k, s - columns));
          score *= scale;
          if (softcap > 0) score = softcap * std::tanh(score / softcap);
          scores[s] = score;
          largest = std::max(largest, score);
        }
        Floats sum = {};
        for (int64_t s = 0; s < width; s += kLanes) {
          const Floats x = Load<Floats>(&scores[s]);
          const Floats p = x == kUnseen ? Floats{} : Exp(x - largest);
          std::memcpy(&scores[s], &p, sizeof p);
          sum += p;
        }
        const float by = 1.0f / std::max(Total(sum), std::numeric_limits<float>::min());
        for (int64_t e = 0; e < head_dim; e += kLanes) {
          Floats value = {};
          for (int64_t s = 0; s < columns; ++s)
            if (sees[s]) value += Format::At(column_v + s * head_dim + e) * scores[s];
          for (int64_t s = columns; s < keys; ++s)
            if (sees[s]) value += F32::At(own(own_v, s - columns) + e) * scores[s];
          value *= by;
          std::memcpy(y + place + e, &value, sizeof value);
        }
      }
    }
  }

  template <typename Format>
  float Inner(const float* query, const typename Format::Stored* key) const {
    Floats sum = {};
    for (int64_t e = 0; e < head_dim; e += kLanes) sum += Load<Floats>(query + e) * Format::At(key + e);
    return Total(sum);
  }
};

template <typename Format>
void Attend(ffi::ThreadPool pool, Attention attention, const void* k, const void* v) {
  InChunks(pool, attention.batch * attention.kv_heads, 1, [attention, k, v](int64_t first, int64_t last) {
    using Stored = typename Format::Stored;
    std::vector<float> scores;
    for (int64_t i = first; i < last; ++i)
      attention.Head<Format>(static_cast<const Stored*>(k), static_cast<const Stored*>(v), i / attention.kv_heads,
                             i % attention.kv_heads, scores);
  });
}

ffi::Error Beside(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::S32> index, ffi::AnyBuffer k,
                  ffi::AnyBuffer v, ffi::Buffer<ffi::F32> own_k, ffi::Buffer<ffi::F32> own_v,
                  ffi::Buffer<ffi::PRED> mask, ffi::Result<ffi::Buffer<ffi::F32>> y, float scale, float softcap) {
  const auto shape = q.dimensions(), stack = k.dimensions();
  const int64_t layer = index.typed_data()[0];
  if (layer < 0 || layer >= stack[0]) return ffi::Error::InvalidArgument("no such layer");
  const Attention attention{shape[0],       shape[1],           shape[2],           stack[2],          stack[3], shape[3],
                            scale,          softcap,            q.typed_data(),     own_k.typed_data(),
                            own_v.typed_data(), mask.typed_data(), y->typed_data()};
  if (k.element_type() == ffi::F32)
    Attend<F32>(pool, attention, Layer<float>(k, layer), Layer<float>(v, layer));
  else
    Attend<Bf16>(pool, attention, Layer<uint16_t>(k, layer), Layer<uint16_t>(v, layer));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(difflm_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("scales")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("rounds"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(difflm_attend_beside, Beside,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
