// The certified gate of one token: products of 8-bit weights with a 16-bit x, which are exact integers, plus a bound on
// their distance from the float32 gate. Rows that the bound proves dead are skipped, the others computed as ever.
#pragma once
#include <cmath>

#include "cpu_plan.h"
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

namespace prosparse {

constexpr int64_t kScreenStep = 64;    // rows of the screen are padded with zeros to whole steps
constexpr int64_t kScreenRows = 256;   // rows screened before their survivors are computed, or the screen is given up
constexpr int64_t kProbeRows = 64;     // the first time: what is read in vain where most rows live
constexpr double kLargest = 0x1p60;    // sizes of x outside [1/kLargest, kLargest] are not screened: no overflow below it
constexpr double kRounding = 1.0 + 0x1p-20;  // covers the roundings of what is computed in double here

struct ScreenedX {
  bool usable = false;
  const uint8_t *high, *low;  // [screen_width] the two bytes of x / step + 32768
  double step;                // of the 16-bit grid
  double norm;                // >= the length of x
  double residue;             // >= the length of x less its place on the grid
  double floor;               // what float32 may lose to underflow
};

inline ScreenedX quantise(const Plan& p, const float* x) {
  ScreenedX out;
  if (!p.screen) return out;
  float largest = 0.0f;
  double squares = 0.0;
  for (int64_t k = 0; k < p.D; k++) {
    const float size = std::fabs(x[k]);
    largest = size > largest ? size : largest;
    squares += (double)x[k] * x[k];
  }
  const double root = std::sqrt((double)p.D);
  out.norm = (std::sqrt(squares) + root * 0x1p-126) * kRounding;  // denormal x may count as zero, here or in the gate
  if (!(largest >= 1.0 / kLargest && out.norm <= kLargest)) return out;  // not for NaN either
  out.usable = true;
  out.step = largest / 32767.0;
  const float inverse = (float)(32767.0 / largest);
  uint8_t *high = p.screen_x, *low = p.screen_x + p.screen_width;
  for (int64_t k = 0; k < p.D; k++) {
    const int32_t place = (int32_t)std::lrintf(x[k] * inverse) + 32768;
    const uint32_t bits = (uint32_t)(place < 0 ? 0 : place > 65535 ? 65535 : place);
    high[k] = (uint8_t)(bits >> 8);
    low[k] = (uint8_t)bits;
  }
  out.high = high;
  out.low = low;
  out.residue = 0.51 * out.step * root;  // half a step, and 2^-8 of one for the rounding of the product with `inverse`
  out.floor = p.screen_floor * (1.0 + out.norm);
  return out;
}

// Sum of row * (256 * high + low), of int8 with uint16, exactly. Both partial sums fit an int32 up to a width of 65536.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
inline int64_t dot_int8(const int8_t* row, const uint8_t* high, const uint8_t* low, int64_t width) {
  __m512i sums[4] = {};
  int64_t k = 0;
  for (; k + 2 * kScreenStep <= width; k += 2 * kScreenStep) {
    const __m512i w0 = _mm512_loadu_si512(row + k), w1 = _mm512_loadu_si512(row + k + kScreenStep);
    __builtin_prefetch(row + k + kAheadBytes, 0, 2);
    __builtin_prefetch(row + k + kAheadBytes + kLineBytes, 0, 2);
    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_loadu_si512(high + k), w0);
    sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_loadu_si512(low + k), w0);
    sums[2] = _mm512_dpbusd_epi32(sums[2], _mm512_loadu_si512(high + k + kScreenStep), w1);
    sums[3] = _mm512_dpbusd_epi32(sums[3], _mm512_loadu_si512(low + k + kScreenStep), w1);
  }
  if (k < width) {
    const __m512i w0 = _mm512_loadu_si512(row + k);
    __builtin_prefetch(row + k + kAheadBytes, 0, 2);
    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_loadu_si512(high + k), w0);
    sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_loadu_si512(low + k), w0);
  }
  return 256 * (int64_t)_mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[2])) +
         _mm512_reduce_add_epi32(_mm512_add_epi32(sums[1], sums[3]));
}
#elif defined(__AVXVNNI__)
inline int32_t sum_of(__m256i v) {
  int32_t lane[8], total = 0;
  std::memcpy(lane, &v, sizeof v);
  for (int i = 0; i < 8; i++) total += lane[i];
  return total;
}
inline int64_t dot_int8(const int8_t* row, const uint8_t* high, const uint8_t* low, int64_t width) {
  __m256i sums[2] = {};
  for (int64_t k = 0; k < width; k += 32) {
    const __m256i w = _mm256_loadu_si256((const __m256i*)(row + k));
    __builtin_prefetch(row + k + kAheadBytes, 0, 2);
    sums[0] = _mm256_dpbusd_avx_epi32(sums[0], _mm256_loadu_si256((const __m256i*)(high + k)), w);
    sums[1] = _mm256_dpbusd_avx_epi32(sums[1], _mm256_loadu_si256((const __m256i*)(low + k)), w);
  }
  return 256 * (int64_t)sum_of(sums[0]) + sum_of(sums[1]);
}
#else
inline int64_t dot_int8(const int8_t* row, const uint8_t* high, const uint8_t* low, int64_t width) {
  int32_t high_sum = 0, low_sum = 0;
  for (int64_t k = 0; k < width; k++) {
    high_sum += row[k] * high[k];
    low_sum += row[k] * low[k];
  }
  return 256 * (int64_t)high_sum + low_sum;
}
#endif

// Whether the row may live: false only if its float32 gate is certainly not kept.
inline bool may_live(const Plan& p, const ScreenedX& x, int64_t row, float threshold) {
  const RowBound& b = p.bounds[row];
  const int64_t sum = dot_int8(p.screen + row * p.screen_width, x.high, x.low, p.screen_width) - 32768 * (int64_t)b.sum;
  const double most = (double)sum * ((double)b.scale * x.step) + b.spread * x.norm + b.norm * x.residue + x.floor;
  return threshold > 0.0f ? !(most < threshold) : !(most <= 0.0);  // a bound that is not a number proves nothing
}

// emit(i, gate of row i) for those of the listed rows that are kept.
template <class T, class Emit>
inline void gates_of(const Plan& p, const T* Wg, const int32_t* rows, int64_t count, const float* x, float threshold,
                     Emit emit) {
  in_groups(count, [&](int64_t first, auto size) {
    const T *row[kRows], *next[kRows];
    float gate[kRows];
    gather(Wg, rows, first, count, p.D, row);
    gather(Wg, rows, first + size.value, count, p.D, next);
    dot_rows<size.value, kRows>(x, row, next, p.D, gate);
    for (int64_t r = 0; r < size.value; r++)
      if (kept(gate[r], threshold)) emit(rows[first + r], gate[r]);
  });
}

// emit(i, gate of row i), in row order, for the kept rows alone; returns how many gates were computed.
template <class T, class Emit>
int64_t screen_rows(const Plan& p, const ScreenedX& screened, const float* x, float threshold, Share rows, Emit emit) {
  // With more survivors than this, reading the screen costs more than it saves.
  constexpr double kWorthwhile = 0.75 - 1.0 / sizeof(T);
  const T* Wg = (const T*)p.w_gate;
  int64_t num_exact = 0, i = rows.begin;
  int32_t survivor[kScreenRows];
  while (i < rows.end) {
    const int64_t done = i - rows.begin, end = least(i + (done ? kScreenRows : kProbeRows), rows.end);
    if (done && num_exact > kWorthwhile * done) break;
    int64_t count = 0;
    for (; i < end; i++) {
      if (!may_live(p, screened, i, threshold)) continue;
      survivor[count++] = (int32_t)i;
      if (count > kRows) continue;
      const char* row = (const char*)(Wg + i * p.D);  // the first group; each group fetches the next
      for (int64_t byte = 0; byte < p.D * (int64_t)sizeof(T); byte += kLineBytes)
        __builtin_prefetch(row + byte, 0, 2);
    }
    gates_of(p, Wg, survivor, count, x, threshold, emit);
    num_exact += count;
  }
  num_exact += rows.end - i;
  stream_rows(x, Wg, i, rows.end, p.D, [&](int64_t row, float gate) {
    if (kept(gate, threshold)) emit(row, gate);
  });
  return num_exact;
}

}  // namespace prosparse
