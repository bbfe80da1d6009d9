// The kernels of one token.
#pragma once
#include "cpu_screen.h"

namespace prosparse {

// Above this share of live rows up reads every row, as the dense kernel does: one unbroken stream is faster than gaps.
constexpr double kStreamShare = 0.7;

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

// y += sum over the list of value * Wd[row]
template <class T>
void down_list(const T* Wd, const int32_t* rows, const float* values, int64_t count, int64_t available, int64_t D,
               float* y) {
  in_groups(count, [&](int64_t i, auto size) {
    const T *row[kRows], *next[kRows];
    gather(Wd, rows, i, count, D, row);
    gather(Wd, rows, i + size.value, available, D, next);
    add_rows<size.value, kRows>(y, row, values + i, next, D);
  });
}

// emit(place in the list, dot(Wu[row], x))
template <class T, class Emit>
void up_list(const float* x, const T* Wu, const int32_t* rows, int64_t count, int64_t D, Emit emit) {
  in_groups(count, [&](int64_t i, auto size) {
    const T *row[kRows], *next[kRows];
    float dot[kRows];
    gather(Wu, rows, i, count, D, row);
    gather(Wu, rows, i + size.value, count, D, next);
    dot_rows<size.value, kRows>(x, row, next, D, dot);
    for (int64_t r = 0; r < size.value; r++) emit(i + r, dot[r]);
  });
}

// up and down of the list in one walk: while four rows of one matrix are used, four of the other arrive.
template <class T>
void up_down_list(const float* x, const T* Wu, const T* Wd, const int32_t* rows, const float* s, int64_t count,
                  int64_t available, int64_t D, float* y) {
  in_groups(count, [&](int64_t i, auto size) {
    const T *up[kRows], *down[kRows], *next[kRows];
    float value[kRows];
    gather(Wu, rows, i, count, D, up);
    gather(Wd, rows, i, count, D, down);
    gather(Wu, rows, i + size.value, available, D, next);
    dot_rows<size.value, size.value>(x, up, down, D, value);
    for (int64_t r = 0; r < size.value; r++) value[r] *= s[i + r];
    add_rows<size.value, kRows>(y, down, value, next, D);
  });
}

inline bool streams(const Plan& p, int64_t threads) { return count_live(p, threads) > kStreamShare * p.F; }

template <class T>
void gate_token(const Plan& p, const float* x, float* s, float threshold) {
  std::memset(p.live_count, 0, 2 * p.num_threads * sizeof(int64_t));
  const ScreenedX screened = quantise(p, x);
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share rows = share(p.F, t, threads);
    if (screened.usable) {
      std::memset(s + rows.begin, 0, (rows.end - rows.begin) * sizeof(float));
      p.live_count[p.num_threads + t] =
          screen_rows<T>(p, screened, x, threshold, rows, [&](int64_t i, float gate) { s[i] = gate; });
      return;
    }
    p.live_count[p.num_threads + t] = rows.end - rows.begin;
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
    if (streams(p, threads)) {
      const int32_t* live = p.live_row + rows.begin;
      const float* value = p.live_value + rows.begin;
      const int32_t* last = live + p.live_count[t];
      stream_rows(x, Wu, rows.begin, rows.end, p.D, [&](int64_t i, float up) {
        if (live < last && *live == i) x1[i] = *value++ * up, live++;
      });
      return;
    }
    balanced(p, t, threads, [&](const int32_t* row, const float* value, int64_t count, int64_t) {
      up_list(x, Wu, row, count, p.D, [&](int64_t i, float up) { x1[row[i]] = value[i] * up; });
    });
  });
}

template <class T>
void s3_token(const Plan& p, const float* x1, float* y) {
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    list_nonzero(p, x1, share(p.F, t, threads), t);
    barrier(threads);
    sum_parts(p, y, p.D, p.stride, t, threads,
              [&](const int32_t* row, const float* value, int64_t count, int64_t available, float* sum) {
                down_list((const T*)p.w_down_t, row, value, count, available, p.D, sum);
              });
  });
}

// What follows the gate: this thread has listed `count` live rows of its share and computed `exact` gates for it.
template <class T>
inline void up_and_down(const Plan& p, const float* x, int64_t count, int64_t exact, int64_t t, int64_t threads,
                        float* y) {
  const T *Wu = (const T*)p.w_up, *Wd = (const T*)p.w_down_t;
  const Share rows = share(p.F, t, threads);
  p.live_count[t] = count;
  p.live_count[p.num_threads + t] = exact;
  barrier(threads);
  const bool stream = streams(p, threads);
  if (stream) {
    const int32_t* row = p.live_row + rows.begin;
    float* value = p.live_value + rows.begin;
    int64_t place = 0;
    stream_rows(x, Wu, rows.begin, rows.end, p.D, [&](int64_t i, float up) {
      if (place < count && row[place] == i) value[place++] *= up;
    });
    barrier(threads);
  }
  sum_parts(p, y, p.D, p.stride, t, threads,
            [&](const int32_t* live, const float* s, int64_t n, int64_t available, float* sum) {
              stream ? down_list(Wd, live, s, n, available, p.D, sum)
                     : up_down_list(x, Wu, Wd, live, s, n, available, p.D, sum);
            });
}

template <class T>
int64_t ffn_token(const Plan& p, const float* x, float* y, float threshold) {
  std::memset(p.live_count, 0, 2 * p.num_threads * sizeof(int64_t));
  const ScreenedX screened = quantise(p, x);
  int64_t num_live = 0;
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share rows = share(p.F, t, threads);
    int32_t* row = p.live_row + rows.begin;
    float* value = p.live_value + rows.begin;
    int64_t count = 0, exact = rows.end - rows.begin;
    if (screened.usable)
      exact = screen_rows<T>(p, screened, x, threshold, rows, [&](int64_t i, float gate) {
        row[count] = (int32_t)i;
        value[count++] = gate;
      });
    else
      stream_rows(x, (const T*)p.w_gate, rows.begin, rows.end, p.D, [&](int64_t i, float gate) {
        row[count] = (int32_t)i;
        value[count] = gate;
        count += kept(gate, threshold);
      });
    up_and_down<T>(p, x, count, exact, t, threads, y);
    if (t == 0) num_live = count_live(p, threads);
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

}  // namespace prosparse
