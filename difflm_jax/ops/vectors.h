// What the C++ functions of this folder share: vectors of 16 floats, chunks of work for threads, layers of a stack.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

namespace ffi = xla::ffi;

typedef float Floats __attribute__((vector_size(64)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int8_t Signed __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16;
#ifdef __AVX512F__
constexpr bool kHasManyRegisters = true;
#else
constexpr bool kHasManyRegisters = false;
#endif

template <typename To, typename From>
inline To Load(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof(To));
  return to;
}

template <typename From, typename To>
inline void Store(From from, To* to) {
  std::memcpy(to, &from, sizeof(From));
}

inline Floats Splat(float x) { return Floats{} + x; }

// The lanes of bfloat16 as float32, and float32 rounded to the nearest bfloat16; NaN stays NaN.
inline Floats Wide(Halves x) {
#ifdef __AVX512F__
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#else
  return (Floats)(__builtin_convertvector(x, Bits) << 16);
#endif
}
inline Floats Rounded(Floats x) {
  const Bits bits = (Bits)x, nearest = bits + 0x7fff + ((bits >> 16) & 1);
  return (Floats)((x == x ? nearest : bits | 0x400000) & 0xffff0000u);
}
inline Halves Narrow(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#elif defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)Rounded(x), 16));
#else
  return __builtin_convertvector((Bits)Rounded(x) >> 16, Halves);
#endif
}

inline auto Narrow(Four x) {
#ifdef __AVX512BF16__
  return _mm_cvtneps_pbh((__m128)x);
#else
  Floats lanes = {};
  std::memcpy(&lanes, &x, sizeof x);
  return Narrow(lanes);
#endif
}

inline Ints Widened(Signed x) {
#ifdef __AVX512F__
  return (Ints)_mm512_cvtepi8_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Ints);
#endif
}
inline Ints Widened(Bytes x) {
#ifdef __AVX512F__
  return (Ints)_mm512_cvtepu8_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Ints);
#endif
}

// Floats, stored as they are or as bfloat16.
inline Floats At(const float* x) { return Load<Floats>(x); }
inline Floats At(const uint16_t* x) { return Wide(Load<Halves>(x)); }
inline void Put(Floats x, float* to) { Store(x, to); }
inline void Put(Floats x, uint16_t* to) { Store(Narrow(x), to); }

// Calls `run` with `count`, at most `Most`, as a template argument.
template <int Most, typename F>
inline void WithCount(int64_t count, F run) {
  if constexpr (Most > 1)
    if (count < Most) return WithCount<Most - 1>(count, run);
  run(std::integral_constant<int, Most>());
}

// Calls `run(first, count)` for parts of 0 .. total - 1, as even as can be, of at most `Most`: a template argument.
template <int Most, typename F>
inline void Evenly(int64_t total, F run) {
  const int64_t parts = (total + Most - 1) / Most;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = total * part / parts;
    WithCount<Most>(total * (part + 1) / parts - first, [&](auto count) { run(first, count); });
  }
}

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

template <typename T>
const T* Layer(const ffi::AnyBuffer& stack, int64_t index) {
  return static_cast<const T*>(stack.untyped_data()) + index * (stack.element_count() / stack.dimensions()[0]);
}

}  // namespace
