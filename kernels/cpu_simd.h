// Vectors of float32 and the inner loops of every kernel: dot products and scaled rows, a few at a time. Written on the
// vector extensions of GCC and Clang, so one source serves AVX-512, AVX2 and anything else.
//
// A dot product is summed in one order only, whichever of the loops here computes it: its bits do not depend on its
// neighbours. The same holds for a sum of scaled rows.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace prosparse {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kStep = 2 * kLanes;
constexpr int64_t kRows = 4;             // rows walked together, so that x or y is read once for four rows
constexpr int64_t kAheadBytes = 4096;    // prefetch distance of a sequential stream: hardware stops at a page's end
constexpr int64_t kLineBytes = 64;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {  // IEEE 754 binary16
  uint16_t bits;
};

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const BFloat16* p) {  // a bfloat16 is the upper half of a float32
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Words) << 16);
}
inline Vec load(const Float16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#else  // exact and without denormal float32, which a process may have told its CPU to take for zero
  const Words half = __builtin_convertvector(h, Words), size = half & 0x7fff, exponent = half & 0x7c00;
  const Words normal = (size << 13) + (112u << 23), huge = (size << 13) | 0x7f800000u;
  const Words tiny = (Words)((Vec)(size | 0x3f000000u) - 0.5f);  // 0.5 + size * 2^-24, less 0.5
  const Words value = exponent == 0x7c00u ? huge : exponent == 0 ? tiny : normal;
  return (Vec)(value | (half & 0x8000) << 16);
#endif
}
template <class T>
inline Vec load_part(const T* p, int64_t n) {  // the first n < kLanes values, the rest zero
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec splat(float value) { return Vec{} + value; }
// a * b + c with one rounding wherever the machine can. Left to the compiler, it is fused in one loop and not in another
// (GCC's tuning for Zen 2 and later), and then the bits of a row depend on its neighbours.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline float sum(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}
inline bool all_finite(const float* x, int64_t n) {
  Vec zeros = {};  // 0 * value is 0, save for an infinity or a NaN
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) zeros = zeros + load(x + k) * splat(0.0f);
  if (k < n) zeros = zeros + load_part(x + k, n - k) * splat(0.0f);
  return sum(zeros) == 0.0f;
}
template <class T>
inline void prefetch(const T* p) {  // the cache lines that one step of kStep values touches
  for (int64_t byte = 0; byte < kStep * (int64_t)sizeof(T); byte += kLineBytes)
    __builtin_prefetch((const char*)p + byte, 0, 2);
}

// out[r * B + b] = dot(row[r], x[b]). While it runs, A rows `ahead` are fetched.
template <int R, int B, int A, class T>
inline void dot_block(const float* const* x, const T* const* row, const T* const* ahead, int64_t D, float* out) {
  Vec even[R * B], odd[R * B];  // two accumulators hide the latency of the multiply-add
  for (int i = 0; i < R * B; i++) even[i] = odd[i] = Vec{};
  int64_t k = 0;
  for (; k + kStep <= D; k += kStep) {
    Vec x0[B], x1[B];
    for (int b = 0; b < B; b++) x0[b] = load(x[b] + k), x1[b] = load(x[b] + k + kLanes);
    for (int r = 0; r < R; r++) {
      const Vec w0 = load(row[r] + k), w1 = load(row[r] + k + kLanes);
      for (int b = 0; b < B; b++) {
        even[r * B + b] = multiply_add(w0, x0[b], even[r * B + b]);
        odd[r * B + b] = multiply_add(w1, x1[b], odd[r * B + b]);
      }
    }
    for (int a = 0; a < A; a++) prefetch(ahead[a] + k);
  }
  for (; k < D; k += kLanes) {
    const int64_t n = D - k < kLanes ? D - k : kLanes;
    for (int r = 0; r < R; r++) {
      const Vec w = load_part(row[r] + k, n);
      for (int b = 0; b < B; b++) even[r * B + b] = multiply_add(w, load_part(x[b] + k, n), even[r * B + b]);
    }
  }
  for (int i = 0; i < R * B; i++) out[i] = sum(even[i] + odd[i]);
}
// out[r] = dot(row[r], x)
template <int R, int A, class T>
inline void dot_rows(const float* x, const T* const* row, const T* const* ahead, int64_t D, float* out) {
  dot_block<R, 1, A>(&x, row, ahead, D, out);
}

// y += value[r] * row[r], r in order.
template <int R, int A, class T>
inline void add_rows(float* y, const T* const* row, const float* value, const T* const* ahead, int64_t D) {
  Vec v[R];
  for (int r = 0; r < R; r++) v[r] = splat(value[r]);
  int64_t k = 0;
  for (; k + kStep <= D; k += kStep) {
    Vec y0 = load(y + k), y1 = load(y + k + kLanes);
    for (int r = 0; r < R; r++) {
      y0 = multiply_add(load(row[r] + k), v[r], y0);
      y1 = multiply_add(load(row[r] + k + kLanes), v[r], y1);
    }
    for (int a = 0; a < A; a++) prefetch(ahead[a] + k);
    store(y + k, y0);
    store(y + k + kLanes, y1);
  }
  for (; k < D; k += kLanes) {
    const int64_t n = D - k < kLanes ? D - k : kLanes;
    Vec y0 = load_part(y + k, n);
    for (int r = 0; r < R; r++) y0 = multiply_add(load_part(row[r] + k, n), v[r], y0);
    std::memcpy(y + k, &y0, n * sizeof(float));
  }
}

}  // namespace prosparse
