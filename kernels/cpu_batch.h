// The kernels of two to eight tokens: weights are read once for all of them, and only the rows that live for some token.
#pragma once
#include "cpu_plan.h"

namespace prosparse {

constexpr int64_t kGroup = 8;          // union rows worked on together, so that y and x are fetched once for several
constexpr int64_t kColumns = 1024;     // of y at a time: a group's values of them stay in the nearest cache

// emit(row, token, dot(W[row], x[token])) for rows i and i + 1 and tokens [0, tokens), at most B. What is beyond `end` or
// `tokens` is computed as a copy of the last one and not emitted.
template <class T, int B, class Emit>
inline void product_block(const T* W, const float* x, int64_t D, int64_t tokens, int64_t i, int64_t end, Emit emit) {
  const float* of[B];
  for (int64_t b = 0; b < B; b++) of[b] = x + least(b, tokens - 1) * D;
  const T* row[2] = {W + i * D, W + least(i + 1, end - 1) * D};
  const T* ahead[2] = {row[0] + 2 * kAheadBytes / (int64_t)sizeof(T), row[1] + 2 * kAheadBytes / (int64_t)sizeof(T)};
  float dot[2 * B];
  dot_block<2, B, 2>(of, row, ahead, D, dot);
  for (int64_t r = 0; r < least(2, end - i); r++)
    for (int64_t b = 0; b < tokens; b++) emit(i + r, b, dot[r * B + b]);
}
// emit(row, token, dot(W[row], x[token])) for these rows and all tokens, x [tokens, D]
template <class T, class Emit>
void product_rows(const T* W, const float* x, int64_t D, int64_t tokens, Share rows, Emit emit) {
  for (int64_t i = rows.begin; i < rows.end; i += 2)
    for (int64_t first = 0; first < tokens; first += 4) {
      const int64_t some = least(4, tokens - first);
      const auto place = [&](int64_t row, int64_t b, float dot) { emit(row, first + b, dot); };
      some > 2 ? product_block<T, 4>(W, x + first * D, D, some, i, rows.end, place)
               : product_block<T, 2>(W, x + first * D, D, some, i, rows.end, place);
    }
}
template <class T>
void gate_share(const Plan& p, const float* x, int64_t tokens, Share rows, float threshold, float* s) {
  product_rows((const T*)p.w_gate, x, p.D, tokens, rows,
               [&](int64_t i, int64_t b, float gate) { s[b * p.F + i] = kept(gate, threshold) ? gate : 0.0f; });
}

// The rows [begin, end) in which some token has a value, into this thread's list.
inline void list_union(const Plan& p, const float* value, int64_t tokens, Share rows, int64_t t) {
  int64_t count = 0;
  int32_t* row = p.live_row + rows.begin;
  for (int64_t i = rows.begin; i < rows.end; i++) {
    bool live = !p.skip_dead;
    for (int64_t b = 0; b < tokens; b++) live |= value[b * p.F + i] != 0.0f;
    row[count] = (int32_t)i;
    count += live;
  }
  p.live_count[t] = count;
}

// The places in a group [0, count) whose row lives for this token, and their values; returns how many.
inline int64_t select(const Plan& p, const float* value, const int32_t* rows, int64_t count, int64_t* place) {
  int64_t live = 0;
  for (int64_t r = 0; r < count; r++) {
    place[live] = r;
    live += !p.skip_dead || value[rows[r]] != 0.0f;
  }
  return live;
}

// value[b, r] = s[b, rows[r]] * dot(Wu[rows[r]], x[b]) where alive. Meanwhile rows of `then` are fetched: for each two
// rows the two that stand `shift` places later in the list, of which `available` entries may be read.
template <class T>
inline void up_group(const Plan& p, const float* s, const float* x, const int32_t* rows, int64_t count,
                     int64_t available, int64_t tokens, const void* then, int64_t shift, float (*value)[kGroup]) {
  for (int64_t first = 0; first < count; first += 2) {
    const int64_t pair = least(2, count - first);
    const T* ahead[2];
    for (int64_t r = 0; r < 2; r++) ahead[r] = row_of<T>(then, rows[least(first + shift + r, available - 1)], p.D);
    bool fetched = false;
    for (int64_t b = 0; b < tokens; b++) {
      int64_t place[2];
      const int64_t live = select(p, s + b * p.F, rows + first, pair, place);
      if (live == 0) continue;
      const T* row[2];
      float dot[2];
      for (int64_t r = 0; r < live; r++) row[r] = row_of<T>(p.w_up, rows[first + place[r]], p.D);
      const float* of = x + b * p.D;
      if (live == 2)
        fetched ? dot_rows<2, 0>(of, row, ahead, p.D, dot) : dot_rows<2, 2>(of, row, ahead, p.D, dot);
      else
        fetched ? dot_rows<1, 0>(of, row, ahead, p.D, dot) : dot_rows<1, 2>(of, row, ahead, p.D, dot);
      fetched = true;
      for (int64_t r = 0; r < live; r++)
        value[b][first + place[r]] = s[b * p.F + rows[first + place[r]]] * dot[r];
    }
  }
}

// y[b] += sum over the group of value[b, r] * Wd[rows[r]] where alive; meanwhile rows next[0..num_next) of `then` are
// fetched.
template <class T>
inline void down_group(const Plan& p, const float* s, const int32_t* rows, int64_t count, int64_t tokens,
                       const float (*value)[kGroup], const void* then, const int32_t* next, int64_t num_next,
                       float* y) {
  int64_t place[kTokens][kGroup], live[kTokens];
  for (int64_t b = 0; b < tokens; b++) live[b] = select(p, s + b * p.F, rows, count, place[b]);
  for (int64_t k = 0; k < p.D; k += kColumns) {
    const int64_t width = least(kColumns, p.D - k);
    for (int64_t b = 0; b < tokens; b++) {
      for (int64_t r = b; r < num_next; r += tokens) {
        const char* row = (const char*)(row_of<T>(then, next[r], p.D) + k);
        for (int64_t byte = 0; byte < width * (int64_t)sizeof(T); byte += kLineBytes)
          __builtin_prefetch(row + byte, 0, 2);
      }
      in_groups(live[b], [&](int64_t first, auto size) {
        const T* row[size.value];
        float v[size.value];
        for (int64_t r = 0; r < size.value; r++) {
          row[r] = row_of<T>(p.w_down_t, rows[place[b][first + r]], p.D) + k;
          v[r] = value[b][place[b][first + r]];
        }
        add_rows<size.value, 0>(y + b * p.D + k, row, v, row, width);
      });
    }
  }
}

template <class T>
void gate_batch(const Plan& p, const float* x, float* s, float threshold, int64_t tokens) {
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    gate_share<T>(p, x, tokens, share(p.F, t, threads), threshold, s);
  });
}

template <class T>
void s2_batch(const Plan& p, const float* s, const float* x, float* x1, int64_t tokens) {
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share mine = share(p.F, t, threads);
    list_union(p, s, tokens, mine, t);
    for (int64_t b = 0; b < tokens; b++)
      std::memset(x1 + b * p.F + mine.begin, 0, (mine.end - mine.begin) * sizeof(float));
    barrier(threads);
    balanced(p, t, threads, [&](const int32_t* rows, const float*, int64_t count, int64_t available) {
      float value[kTokens][kGroup];
      for (int64_t i = 0; i < count; i += kGroup) {
        const int64_t n = least(kGroup, count - i);
        std::memset(value, 0, sizeof value);
        up_group<T>(p, s, x, rows + i, n, available - i, tokens, p.w_up, 2, value);
        for (int64_t b = 0; b < tokens; b++)
          for (int64_t r = 0; r < n; r++) x1[b * p.F + rows[i + r]] = value[b][r];
      }
    });
  });
}

template <class T>
void s3_batch(const Plan& p, const float* x1, float* y, int64_t tokens) {
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    list_union(p, x1, tokens, share(p.F, t, threads), t);
    barrier(threads);
    sum_parts(p, y, tokens * p.D, tokens * p.stride, t, threads,
              [&](const int32_t* rows, const float*, int64_t count, int64_t available, float* sum) {
                float value[kTokens][kGroup];
                for (int64_t i = 0; i < count; i += kGroup) {
                  const int64_t n = least(kGroup, count - i), more = least(kGroup, available - i - n);
                  for (int64_t b = 0; b < tokens; b++)
                    for (int64_t r = 0; r < n; r++) value[b][r] = x1[b * p.F + rows[i + r]];
                  down_group<T>(p, x1, rows + i, n, tokens, value, p.w_down_t, rows + i + n, more, sum);
                }
              });
  });
}

template <class T>
int64_t ffn_batch(const Plan& p, const float* x, float* y, float threshold, int64_t tokens) {
  float* s = p.dense;
  int64_t num_live = 0;
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share mine = share(p.F, t, threads);
    gate_share<T>(p, x, tokens, mine, threshold, s);
    list_union(p, s, tokens, mine, t);
    barrier(threads);
    sum_parts(p, y, tokens * p.D, tokens * p.stride, t, threads,
              [&](const int32_t* rows, const float*, int64_t count, int64_t available, float* sum) {
                float value[kTokens][kGroup];
                for (int64_t i = 0; i < count; i += kGroup) {
                  const int64_t n = least(kGroup, count - i), more = least(kGroup, available - i - n);
                  up_group<T>(p, s, x, rows + i, n, available - i, tokens, p.w_down_t, 0, value);
                  down_group<T>(p, s, rows + i, n, tokens, value, p.w_up, rows + i + n, more, sum);
                }
              });
  });
  for (int64_t i = 0; i < tokens * p.F; i++) num_live += s[i] != 0.0f;
  return num_live;
}

}  // namespace prosparse
