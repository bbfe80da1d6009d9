// What every kernel shares: the plan of one FFN, threads, lists of live rows, and sums over them in a fixed order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_simd.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace prosparse {

constexpr int64_t kTokens = 8;     // tokens that share one reading of the weights
constexpr int64_t kParts = 32;     // at most so many partial sums of y, hence of threads that sum y
constexpr int64_t kPartRows = 128; // of at least so many neurons each

struct RowBound {  // of one gate row: see kernels/certified.py for what these bound
  float scale, spread, norm;
  int32_t sum;
};

struct Plan {  // mirrored by kernels/cpu.py: Plan
  const void *w_gate, *w_up, *w_down_t;
  int64_t F, D;
  int64_t num_threads;
  int64_t dtype;         // 0 float32, 1 bfloat16, 2 float16
  int64_t skip_dead;     // 0: the dense twin, every row is read
  int32_t* live_row;     // [F] thread t writes its rows from the first row of its share on
  float* live_value;     // [F]
  int64_t* live_count;   // [2 * num_threads] live rows of each thread, then rows that its screen let through
  float* dense;          // [F], for several tokens [kTokens, F]: s of the dense twin and of batches
  float* partial;        // [parts, stride], for several tokens [parts, kTokens * stride]; one thread needs one part
  int64_t stride;        // D, rounded up to whole cache lines: threads never write to one
  const int8_t* screen;  // [F, screen_width] the gate in 8 bits; null: not screened
  const RowBound* bounds;  // [F]
  uint8_t* screen_x;       // [2, screen_width] room for x in 16 bits
  int64_t screen_width;    // D, rounded up to kScreenStep
  double screen_floor;     // see certified.py
};

struct Share {
  int64_t begin, end;
};
inline Share share(int64_t n, int64_t t, int64_t threads) { return {n * t / threads, n * (t + 1) / threads}; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Body>
inline void parallel(int64_t num_threads, Body body) {
#ifdef _OPENMP
  if (num_threads > 1) {
#pragma omp parallel num_threads((int)num_threads)
    body((int64_t)omp_get_thread_num(), (int64_t)omp_get_num_threads());
    return;
  }
#endif
  (void)num_threads;
  body(0, 1);
}
inline void barrier(int64_t threads) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp barrier
  }
#endif
  (void)threads;
}

inline bool kept(float gate, float threshold) { return threshold > 0.0f ? gate >= threshold : gate > 0.0f; }

template <class T>
inline const T* row_of(const void* matrix, int64_t row, int64_t D) {
  return (const T*)matrix + row * D;
}

// emit(i, dot(W[i], x)) for i in [begin, end). Row after row, the matrix is one sequential stream; measured faster than
// four rows side by side, most of all for bfloat16.
template <class T, class Emit>
inline void stream_rows(const float* x, const T* W, int64_t begin, int64_t end, int64_t D, Emit emit) {
  for (int64_t i = begin; i < end; i++) {
    const T* row[1] = {W + i * D};
    const T* ahead[1] = {row[0] + kAheadBytes / (int64_t)sizeof(T)};
    float dot;
    dot_rows<1, 1>(x, row, ahead, D, &dot);
    emit(i, dot);
  }
}

// The first kRows rows of a list from `first` on; past `count` the last one again, harmless to prefetch.
template <class T>
inline void gather(const T* W, const int32_t* rows, int64_t first, int64_t count, int64_t D, const T** out) {
  for (int64_t r = 0; r < kRows; r++) out[r] = W + (int64_t)rows[least(first + r, count - 1)] * D;
}

template <int N>
struct Size {
  static constexpr int value = N;
};
// use(first, Size<R>()) for count things, kRows at a time and then the rest at once
template <class Use>
inline void in_groups(int64_t count, Use use) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) use(i, Size<kRows>());
  switch (count - i) {
    case 3: use(i, Size<3>()); break;
    case 2: use(i, Size<2>()); break;
    case 1: use(i, Size<1>()); break;
  }
}

inline int64_t count_live(const Plan& p, int64_t threads) {
  int64_t total = 0;
  for (int64_t q = 0; q < threads; q++) total += p.live_count[q];
  return total;
}

// use(rows, values, count, available) on the places [wanted) of all threads' lists put one after another; `available`
// rows follow in memory, to prefetch.
template <class Use>
inline void walk(const Plan& p, Share wanted, int64_t threads, Use use) {
  int64_t offset = 0;
  for (int64_t q = 0; q < threads; q++) {
    const int64_t first = share(p.F, q, threads).begin, count = p.live_count[q];
    const int64_t begin = wanted.begin > offset ? wanted.begin - offset : 0;
    const int64_t end = least(wanted.end - offset, count);
    if (begin < end) use(p.live_row + first + begin, p.live_value + first + begin, end - begin, count - begin);
    offset += count;
  }
}

// This thread's equal part of all lists.
template <class Use>
inline void balanced(const Plan& p, int64_t t, int64_t threads, Use use) {
  walk(p, share(count_live(p, threads), t, threads), threads, use);
}

// How many listed rows come before this neuron: the lists of all threads are in row order.
inline int64_t place_of(const Plan& p, int64_t neuron, int64_t threads) {
  int64_t place = 0;
  for (int64_t q = 0; q < threads; q++) {
    const int32_t* rows = p.live_row + share(p.F, q, threads).begin;
    place += std::lower_bound(rows, rows + p.live_count[q], neuron) - rows;
  }
  return place;
}

// y[width] = the sum of what add(rows, values, count, available, sum) adds for the live rows. The neurons are cut into
// parts by d_ff alone, and the parts are added in order: the same bits for any number of threads, and for any rows that
// are listed besides without adding anything.
template <class Add>
inline void sum_parts(const Plan& p, float* y, int64_t width, int64_t stride, int64_t t, int64_t threads, Add add) {
  const int64_t num_live = count_live(p, threads), most = least(p.F / kPartRows, kParts), parts = most > 1 ? most : 1;
  int64_t end = 0;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t begin = end;
    end = place_of(p, share(p.F, part, parts).end, threads);
    if (threads > 1 && t != (num_live ? least(begin * threads / num_live, threads - 1) : 0)) continue;
    float* sum = threads > 1 ? p.partial + part * stride : part > 0 ? p.partial : y;
    std::memset(sum, 0, width * sizeof(float));
    walk(p, {begin, end}, threads,
         [&](const int32_t* rows, const float* values, int64_t count, int64_t available) {
           add(rows, values, count, available, sum);
         });
    if (threads == 1 && part > 0)
      for (int64_t k = 0; k < width; k++) y[k] += sum[k];
  }
  if (threads == 1) return;
  barrier(threads);
  const Share columns = share(width, t, threads);
  for (int64_t k = columns.begin; k < columns.end; k++) y[k] = p.partial[k];
  for (int64_t part = 1; part < parts; part++)
    for (int64_t k = columns.begin; k < columns.end; k++) y[k] += p.partial[part * stride + k];
}

}  // namespace prosparse
