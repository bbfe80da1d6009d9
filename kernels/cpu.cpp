// Native CPU kernels of the sparse gated FFN. Built on first use by kernels/cpu.py, called through ctypes.
//
//   g = x Wg^T;  s = g where kept, else 0;  x1 = s * (x Wu^T);  y = x1 Wd^T     (Wd^T is stored, [F, D])
//
// Every matrix is [F, D] row-major, so a dead neuron is one row that is never read. Weights are float32 or bfloat16,
// vectors and sums float32.
//
// Determinism: a row's dot product is summed in the same order wherever the row falls, so gate values (and the live
// set) do not depend on the number of threads. y is summed per thread and then over threads in thread order: bitwise
// repeatable for one number of threads, equal up to rounding between different numbers.
#include <cstdint>
#include <cstring>

#include "cpu_simd.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using namespace prosparse;

// emit(i, dot(W[i], x)) for i in [begin, end). Row after row, the matrix is one sequential stream; measured faster than
// four rows side by side, most of all for bfloat16.
template <class T, class Emit>
inline void stream_rows(const float* x, const T* W, int64_t begin, int64_t end, int64_t D, Emit emit) {
  for (int64_t i = begin; i < end; i++) {
    const T* row[1] = {W + i * D};
    const T* ahead[1] = {row[0] + kAheadBytes / (int64_t)sizeof(T)};
    float dot;
    dot_rows<1>(x, row, ahead, D, &dot);
    emit(i, dot);
  }
}

struct Plan {  // mirrored by kernels/cpu.py: _Plan
  const void *w_gate, *w_up, *w_down_t;
  int64_t F, D;
  int64_t num_threads;
  int64_t is_bfloat16;
  int64_t skip_dead;     // 0: the dense twin, every row is read
  int32_t* live_row;     // [F] thread t writes its rows from the first row of its share on
  float* live_value;     // [F]
  int64_t* live_count;   // [num_threads]
  float* dense;          // [F] s or x1 of the dense twin
  float* partial;        // [num_threads, stride]
  int64_t stride;
};

struct Share {
  int64_t begin, end;
};
inline Share share(int64_t n, int64_t t, int64_t threads) { return {n * t / threads, n * (t + 1) / threads}; }

template <class Body>
inline void parallel(int64_t num_threads, Body body) {
#ifdef _OPENMP
  if (num_threads > 1) {
#pragma omp parallel num_threads((int)num_threads)
    body((int64_t)omp_get_thread_num(), (int64_t)omp_get_num_threads());
    return;
  }
#endif
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

// Calls use(rows, values, count) on this thread's equal part of all threads' live lists, in list order.
template <class Use>
inline void balanced(const Plan& p, int64_t t, int64_t threads, Use use) {
  int64_t total = 0, offset = 0;
  for (int64_t q = 0; q < threads; q++) total += p.live_count[q];
  const Share mine = share(total, t, threads);
  for (int64_t q = 0; q < threads; q++) {
    const int64_t first = share(p.F, q, threads).begin, count = p.live_count[q];
    const int64_t begin = mine.begin > offset ? mine.begin - offset : 0;
    const int64_t end = mine.end - offset < count ? mine.end - offset : count;
    if (begin < end) use(p.live_row + first + begin, p.live_value + first + begin, end - begin);
    offset += count;
  }
}

// The rows [begin, end) whose value is not zero, into this thread's list.
inline void list_nonzero(const Plan& p, const float* value, Share rows, int64_t t) {
  int64_t count = 0;
  int32_t* row = p.live_row + rows.begin;
  float* live = p.live_value + rows.begin;
  for (int64_t i = rows.begin; i < rows.end; i++) {  // without a branch: at 50 % no predictor would guess it
    row[count] = (int32_t)i;
    live[count] = value[i];
    count += !p.skip_dead || value[i] != 0.0f;
  }
  p.live_count[t] = count;
}

template <class T>
inline void gather(const T* W, const int32_t* rows, int64_t first, int64_t count, int64_t D, const T** out) {
  for (int64_t r = 0; r < kRows; r++) {  // past the end: the last row again, harmless to prefetch
    const int64_t i = first + r < count ? first + r : count - 1;
    out[r] = W + (int64_t)rows[i] * D;
  }
}

// y += sum over the list of value * Wd[row]
template <class T>
void down_list(const T* Wd, const int32_t* rows, const float* values, int64_t count, int64_t D, float* y) {
  const T *row[kRows], *next[kRows];
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    gather(Wd, rows, i, count, D, row);
    gather(Wd, rows, i + kRows, count, D, next);
    add_rows<kRows>(y, row, values + i, next, D);
  }
  for (; i < count; i++) {
    row[0] = Wd + (int64_t)rows[i] * D;
    add_rows<1>(y, row, values + i, (const T* const*)nullptr, D);
  }
}

// emit(row, s, dot(Wu[row], x)) for the whole list
template <class T, class Emit>
void up_list(const float* x, const T* Wu, const int32_t* rows, const float* s, int64_t count, int64_t D, Emit emit) {
  const T *row[kRows], *next[kRows];
  float dot[kRows];
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    gather(Wu, rows, i, count, D, row);
    gather(Wu, rows, i + kRows, count, D, next);
    dot_rows<kRows>(x, row, next, D, dot);
    for (int64_t r = 0; r < kRows; r++) emit(rows[i + r], s[i + r], dot[r]);
  }
  for (; i < count; i++) {
    row[0] = Wu + (int64_t)rows[i] * D;
    dot_rows<1>(x, row, (const T* const*)nullptr, D, dot);
    emit(rows[i], s[i], dot[0]);
  }
}

// up and down of the list in one walk: while four rows of one matrix are used, four of the other arrive.
template <class T>
void up_down_list(const float* x, const T* Wu, const T* Wd, const int32_t* rows, const float* s, int64_t count,
                  int64_t D, float* y) {
  const T *up[kRows], *down[kRows], *next[kRows];
  float value[kRows];
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    gather(Wu, rows, i, count, D, up);
    gather(Wd, rows, i, count, D, down);
    gather(Wu, rows, i + kRows, count, D, next);
    dot_rows<kRows>(x, up, down, D, value);
    for (int64_t r = 0; r < kRows; r++) value[r] *= s[i + r];
    add_rows<kRows>(y, down, value, next, D);
  }
  for (; i < count; i++) {
    up[0] = Wu + (int64_t)rows[i] * D;
    down[0] = Wd + (int64_t)rows[i] * D;
    dot_rows<1>(x, up, down, D, value);
    value[0] *= s[i];
    add_rows<1>(y, down, value, (const T* const*)nullptr, D);
  }
}

// Where thread t sums its part of y; join() then adds the parts in thread order.
inline float* part_of(const Plan& p, float* y, int64_t t, int64_t threads) {
  float* part = threads == 1 ? y : p.partial + t * p.stride;
  std::memset(part, 0, p.D * sizeof(float));
  return part;
}
inline void join(const Plan& p, float* y, int64_t t, int64_t threads) {
  if (threads == 1) return;
  barrier(threads);
  const Share columns = share(p.D, t, threads);
  for (int64_t k = columns.begin; k < columns.end; k++) y[k] = p.partial[k];
  for (int64_t q = 1; q < threads; q++)
    for (int64_t k = columns.begin; k < columns.end; k++) y[k] += p.partial[q * p.stride + k];
}

template <class T>
void gate_token(const Plan& p, const float* x, float* s, float threshold) {
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share rows = share(p.F, t, threads);
    stream_rows(x, (const T*)p.w_gate, rows.begin, rows.end, p.D,
                [&](int64_t i, float gate) { s[i] = kept(gate, threshold) ? gate : 0.0f; });
  });
}

template <class T>
void s2_token(const Plan& p, const float* s, const float* x, float* x1) {
  const T* Wu = (const T*)p.w_up;
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share rows = share(p.F, t, threads);
    if (!p.skip_dead) {
      stream_rows(x, Wu, rows.begin, rows.end, p.D, [&](int64_t i, float up) { x1[i] = s[i] * up; });
      return;
    }
    list_nonzero(p, s, rows, t);
    std::memset(x1 + rows.begin, 0, (rows.end - rows.begin) * sizeof(float));
    barrier(threads);
    balanced(p, t, threads, [&](const int32_t* row, const float* value, int64_t count) {
      up_list(x, Wu, row, value, count, p.D, [&](int32_t i, float gate, float up) { x1[i] = gate * up; });
    });
  });
}

template <class T>
void s3_token(const Plan& p, const float* x1, float* y) {
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    list_nonzero(p, x1, share(p.F, t, threads), t);
    float* part = part_of(p, y, t, threads);
    barrier(threads);
    balanced(p, t, threads, [&](const int32_t* row, const float* value, int64_t count) {
      down_list((const T*)p.w_down_t, row, value, count, p.D, part);
    });
    join(p, y, t, threads);
  });
}

template <class T>
int64_t ffn_token(const Plan& p, const float* x, float* y, float threshold) {
  int64_t num_live = 0;
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share rows = share(p.F, t, threads);
    int32_t* row = p.live_row + rows.begin;
    float* value = p.live_value + rows.begin;
    int64_t count = 0;
    stream_rows(x, (const T*)p.w_gate, rows.begin, rows.end, p.D, [&](int64_t i, float gate) {
      row[count] = (int32_t)i;
      value[count] = gate;
      count += kept(gate, threshold);
    });
    p.live_count[t] = count;
    float* part = part_of(p, y, t, threads);
    barrier(threads);
    balanced(p, t, threads, [&](const int32_t* live, const float* s, int64_t n) {
      up_down_list(x, (const T*)p.w_up, (const T*)p.w_down_t, live, s, n, p.D, part);
    });
    join(p, y, t, threads);
    if (t == 0)
      for (int64_t q = 0; q < threads; q++) num_live += p.live_count[q];
  });
  return num_live;
}

template <class T>
int64_t ffn_dense_token(const Plan& p, const float* x, float* y, float threshold) {
  gate_token<T>(p, x, p.dense, threshold);
  int64_t num_live = 0;
  for (int64_t i = 0; i < p.F; i++) num_live += p.dense[i] != 0.0f;
  s2_token<T>(p, p.dense, x, p.dense);
  s3_token<T>(p, p.dense, y);
  return num_live;
}

template <class T>
void gemv(const T* W, const float* x, float* out, int64_t rows, int64_t D, int64_t num_threads) {
  parallel(num_threads, [&](int64_t t, int64_t threads) {
    const Share mine = share(rows, t, threads);
    stream_rows(x, W, mine.begin, mine.end, D, [&](int64_t i, float dot) { out[i] = dot; });
  });
}

}  // namespace

extern "C" {

int64_t psk_has_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
int64_t psk_vector_bits() { return kLanes * 32; }

// x [tokens, D] -> s [tokens, F]
void psk_gate(const Plan* p, const float* x, float* s, float threshold, int64_t tokens) {
  for (int64_t b = 0; b < tokens; b++)
    p->is_bfloat16 ? gate_token<BFloat16>(*p, x + b * p->D, s + b * p->F, threshold)
                   : gate_token<float>(*p, x + b * p->D, s + b * p->F, threshold);
}

// s [tokens, F], x [tokens, D] -> x1 [tokens, F]
void psk_s2(const Plan* p, const float* s, const float* x, float* x1, int64_t tokens) {
  for (int64_t b = 0; b < tokens; b++)
    p->is_bfloat16 ? s2_token<BFloat16>(*p, s + b * p->F, x + b * p->D, x1 + b * p->F)
                   : s2_token<float>(*p, s + b * p->F, x + b * p->D, x1 + b * p->F);
}

// x1 [tokens, F] -> y [tokens, D]
void psk_s3(const Plan* p, const float* x1, float* y, int64_t tokens) {
  for (int64_t b = 0; b < tokens; b++)
    p->is_bfloat16 ? s3_token<BFloat16>(*p, x1 + b * p->F, y + b * p->D)
                   : s3_token<float>(*p, x1 + b * p->F, y + b * p->D);
}

// x [tokens, D] -> y [tokens, D]; returns the number of live neurons, summed over the tokens
int64_t psk_ffn(const Plan* p, const float* x, float* y, float threshold, int64_t tokens) {
  int64_t num_live = 0;
  for (int64_t b = 0; b < tokens; b++, x += p->D, y += p->D) {
    if (p->skip_dead)
      num_live += p->is_bfloat16 ? ffn_token<BFloat16>(*p, x, y, threshold) : ffn_token<float>(*p, x, y, threshold);
    else
      num_live += p->is_bfloat16 ? ffn_dense_token<BFloat16>(*p, x, y, threshold)
                                 : ffn_dense_token<float>(*p, x, y, threshold);
  }
  return num_live;
}

// W [rows, D], x [D] -> out [rows]
void psk_gemv(const void* W, const float* x, float* out, int64_t rows, int64_t D, int64_t is_bfloat16,
              int64_t num_threads) {
  is_bfloat16 ? gemv((const BFloat16*)W, x, out, rows, D, num_threads)
              : gemv((const float*)W, x, out, rows, D, num_threads);
}

// Reads n floats once, sequentially; the sum is returned so that the reads cannot be removed.
float psk_read(const float* data, int64_t n, int64_t num_threads) {
  float total = 0.0f;
  parallel(num_threads, [&](int64_t t, int64_t threads) {
    const Share mine = share(n / (4 * kStep), t, threads);
    Vec sums[8] = {};
    for (int64_t block = mine.begin; block < mine.end; block++) {
      const float* p = data + block * 4 * kStep;
      for (int i = 0; i < 8; i++) sums[i] += load(p + i * kLanes);
      for (int i = 0; i < 4; i++) prefetch(p + kAheadBytes / 4 + i * kStep);
    }
    const float mine_sum = sum((sums[0] + sums[1]) + (sums[2] + sums[3]) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
#ifdef _OPENMP
#pragma omp critical
#endif
    total += mine_sum;
  });
  return total;
}

// Asks for huge pages in [address, address + size), both multiples of 2 MiB, before the memory is first written.
// Returns whether the system listens.
int64_t psk_huge_pages(void* address, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  return size > 0 && madvise(address, size, MADV_HUGEPAGE) == 0;
#else
  (void)address, (void)size;
  return 0;
#endif
}

}  // extern "C"
