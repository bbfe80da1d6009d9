// Vectors of float32 and the two inner loops of every kernel: four dot products at a time, four scaled rows at a time.
// Written on the vector extensions of GCC and Clang, so one source serves AVX-512, AVX2 and anything else.
#pragma once
#include <cstdint>
#include <cstring>

namespace prosparse {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kStep = 2 * kLanes;    // two accumulators a row hide the latency of the multiply-add
constexpr int64_t kRows = 4;             // rows walked together, so that x or y is read once for four rows
constexpr int64_t kAheadBytes = 4096;    // prefetch distance of a sequential stream: hardware stops at a page's end
constexpr int64_t kLineBytes = 64;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
struct BFloat16 {
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
template <class T>
inline Vec load_part(const T* p, int64_t n) {  // the first n < kLanes values, the rest zero
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec splat(float value) { return Vec{} + value; }
inline float sum(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}
template <class T>
inline void prefetch(const T* p) {  // the cache lines that one step of kStep values touches
  for (int64_t byte = 0; byte < kStep * (int64_t)sizeof(T); byte += kLineBytes)
    __builtin_prefetch((const char*)p + byte, 0, 2);
}

// out[r] = dot(row[r], x). While it runs, the rows `ahead` are fetched (nullptr: none).
template <int R, class T>
inline void dot_rows(const float* x, const T* const* row, const T* const* ahead, int64_t D, float* out) {
  Vec even[R], odd[R];
  for (int r = 0; r < R; r++) even[r] = odd[r] = Vec{};
  int64_t k = 0;
  for (; k + kStep <= D; k += kStep) {
    const Vec x0 = load(x + k), x1 = load(x + k + kLanes);
    for (int r = 0; r < R; r++) {
      even[r] = even[r] + load(row[r] + k) * x0;
      odd[r] = odd[r] + load(row[r] + k + kLanes) * x1;
      if (ahead) prefetch(ahead[r] + k);
    }
  }
  for (; k < D; k += kLanes) {
    const int64_t n = D - k;
    const Vec x0 = n < kLanes ? load_part(x + k, n) : load(x + k);
    for (int r = 0; r < R; r++) {
      const Vec w = n < kLanes ? load_part(row[r] + k, n) : load(row[r] + k);
      even[r] = even[r] + w * x0;
    }
  }
  for (int r = 0; r < R; r++) out[r] = sum(even[r] + odd[r]);
}

// y += value[r] * row[r], r in order.
template <int R, class T>
inline void add_rows(float* y, const T* const* row, const float* value, const T* const* ahead, int64_t D) {
  Vec v[R];
  for (int r = 0; r < R; r++) v[r] = splat(value[r]);
  int64_t k = 0;
  for (; k + kStep <= D; k += kStep) {
    Vec y0 = load(y + k), y1 = load(y + k + kLanes);
    for (int r = 0; r < R; r++) {
      y0 = y0 + load(row[r] + k) * v[r];
      y1 = y1 + load(row[r] + k + kLanes) * v[r];
      if (ahead) prefetch(ahead[r] + k);
    }
    store(y + k, y0);
    store(y + k + kLanes, y1);
  }
  for (; k < D; k++) {
    float total = y[k];
    for (int r = 0; r < R; r++) {
      const Vec w = load_part(row[r] + k, 1);
      total += w[0] * value[r];
    }
    y[k] = total;
  }
}

}  // namespace prosparse
