// Attention of few rows to cached columns and to each other. Built and called by few_rows.py, whose XLA path is the
// oracle of the tests.
//
// A row's result depends on the keys that it sees, in their order, and on nothing else: not on how many rows or columns
// there are, nor on which of its keys are columns. A score is a sum in the order of the dimensions, a value in that of
// the keys. All of it is in float32.
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr float kUnseen = -std::numeric_limits<float>::infinity();  // the score of a key that is not seen
constexpr int kQueries = kHasManyRegisters ? 8 : 4;                 // whose scores are made together
constexpr int kValues = kHasManyRegisters ? 4 : 2;                  // whose values are

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

  int64_t Group() const { return heads / kv_heads; }
  int64_t Keys() const { return columns + length; }
};

// What the queries of some rows of one batch entry need to read the keys of one head. Query i is row `first` + i / group.
template <typename Stored>
struct Queries {
  const Attention& of;
  const Stored *k, *v;  // [S, E]
  int64_t b, head, first, count;
  std::vector<float> scores;  // [count, width]; after `Weigh` the weights of the keys

  int64_t Width() const { return (of.Keys() + kLanes - 1) / kLanes * kLanes; }
  const bool* Sees(int64_t i) const { return of.mask + (b * of.length + first + i / of.Group()) * of.Keys(); }
  int64_t Place(int64_t i) const {
    return ((b * of.length + first + i / of.Group()) * of.heads + head * of.Group() + i % of.Group()) * of.head_dim;
  }
  const float* Own(const float* x, int64_t s) const {
    return x + ((b * of.length + s - of.columns) * of.kv_heads + head) * of.head_dim;
  }

  // Scores of 16 keys at a time, a lane for each.
  void Score() {
    const int64_t width = Width(), keys = of.Keys(), size = of.head_dim;
    scores.assign(count * width, kUnseen);
    std::vector<float> block(size * kLanes);  // [E, 16]
    for (int64_t s = 0; s < width; s += kLanes) {
      const int64_t real = std::min(kLanes, keys - s);
      bool is_seen = false;
      for (int64_t i = 0; i < count && !is_seen; i += of.Group())
        is_seen = std::any_of(Sees(i) + s, Sees(i) + s + real, [](bool sees) { return sees; });
      if (!is_seen) continue;
      for (int64_t lane = 0; lane < real; ++lane) {
        const int64_t key = s + lane;
        for (int64_t e = 0; e < size; e += kLanes) {
          const Floats part = key < of.columns ? At(k + key * size + e) : At(Own(of.own_k, key) + e);
          for (int64_t i = 0; i < kLanes; ++i) block[(e + i) * kLanes + lane] = part[i];
        }
      }
      Evenly<kQueries>(count, [&](int64_t i, auto together) { Block<together()>(block.data(), i, s, real); });
    }
  }

  template <int Q>
  void Block(const float* block, int64_t i, int64_t s, int64_t real) {
    Floats sums[Q] = {};
    const float* query[Q];
    for (int n = 0; n < Q; ++n) query[n] = of.q + Place(i + n);
    for (int64_t e = 0; e < of.head_dim; ++e) {
      const Floats lanes = At(block + e * kLanes);
      for (int n = 0; n < Q; ++n) sums[n] += lanes * query[n][e];
    }
    for (int n = 0; n < Q; ++n) {
      const bool* sees = Sees(i + n) + s;
      float* to = &scores[(i + n) * Width() + s];
      for (int64_t lane = 0; lane < real; ++lane) {
        float score = sums[n][lane] * of.scale;
        if (of.softcap > 0) score = of.softcap * std::tanh(score / of.softcap);
        to[lane] = sees[lane] ? score : kUnseen;
      }
    }
  }

  // e^(score - the largest), 0 where a key is not seen.
  void Weigh() {
    const int64_t width = Width();
    for (int64_t i = 0; i < count; ++i) {
      float* own = &scores[i * width];
      Floats lanes = Splat(kUnseen);
      for (int64_t s = 0; s < width; s += kLanes) lanes = At(own + s) > lanes ? At(own + s) : lanes;
      float largest = kUnseen;
      for (int64_t lane = 0; lane < kLanes; ++lane) largest = std::max(largest, lanes[lane]);
      for (int64_t s = 0; s < width; s += kLanes) {
        const Floats x = At(own + s);
        Put(x == kUnseen ? Floats{} : Exp(x - largest), own + s);
      }
    }
  }

  void Sum() const {
    Evenly<kValues>(count, [&](int64_t i, auto together) {
      int64_t e = 0;
      for (; e + 4 * kLanes <= of.head_dim; e += 4 * kLanes) Values<together(), 4>(i, e);
      for (; e < of.head_dim; e += kLanes) Values<together(), 1>(i, e);
    });
  }

  // E vectors, from dimension `e` on, of the values of Q queries.
  template <int Q, int E>
  void Values(int64_t i, int64_t e) const {
    Floats values[Q][E] = {}, sums[Q] = {};
    const float* weights[Q];
    const bool* sees[Q];
    for (int n = 0; n < Q; ++n) weights[n] = &scores[(i + n) * Width()], sees[n] = Sees(i + n);
    const auto add = [&](int64_t s, const auto* value) {
      Floats lanes[E];
      for (int part = 0; part < E; ++part) lanes[part] = At(value + e + part * kLanes);
      for (int n = 0; n < Q; ++n) {
        if (!sees[n][s]) continue;  // its value, which may be NaN, does not count
        const Floats weight = Splat(weights[n][s]);
        sums[n] += weight;
        for (int part = 0; part < E; ++part) values[n][part] += lanes[part] * weight;
      }
    };
    for (int64_t s = 0; s < of.columns; ++s) add(s, v + s * of.head_dim);
    for (int64_t s = of.columns; s < of.Keys(); ++s) add(s, Own(of.own_v, s));
    for (int n = 0; n < Q; ++n) {
      const float by = 1.0f / std::max(sums[n][0], std::numeric_limits<float>::min());
      for (int part = 0; part < E; ++part) Put(values[n][part] * by, of.y + Place(i + n) + e + part * kLanes);
    }
  }
};

template <typename Stored>
void Attend(ffi::ThreadPool pool, const Attention& of, const Stored* k, const Stored* v) {
  // At least two parts for each thread, where there are as many rows.
  const int64_t heads = of.batch * of.kv_heads, wanted = (2 * pool.num_threads() + heads - 1) / heads;
  const int64_t parts = std::max<int64_t>(1, std::min(of.length, wanted));
  InChunks(pool, heads * parts, 1, [&of, k, v, parts](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts, first = of.length * (i % parts) / parts;
      const int64_t rows = of.length * (i % parts + 1) / parts - first, at = head * of.columns * of.head_dim;
      Queries<Stored> queries{of, k + at, v + at, head / of.kv_heads, head % of.kv_heads, first, rows * of.Group()};
      queries.Score();
      queries.Weigh();
      queries.Sum();
    }
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
    Attend(pool, attention, Layer<float>(k, layer), Layer<float>(v, layer));
  else
    Attend(pool, attention, Layer<uint16_t>(k, layer), Layer<uint16_t>(v, layer));
  return ffi::Error::Success();
}

}  // namespace

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
