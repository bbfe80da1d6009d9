// The FFN of one token on the neurons that a low-rank predictor names: fc2 relu(fc1 x) >= cutoff.
#pragma once
#include "cpu_token.h"

namespace prosparse {

struct Predictor {  // mirrored by kernels/decoder.py: _Predictor
  const void *fc1, *fc2;  // [hidden, D], [F, hidden] of the weights' type
  float* inner;           // [hidden]
  int64_t hidden;
  int64_t pre_norm;       // 1: it reads the residual stream before the FFN's norm
  double cutoff;          // the score from which on a neuron is computed
};

// x -> y, where `seen` is what the predictor reads, both [D]. The bits are those of ffn_token with the other neurons'
// gates at zero. live_count's second half says how many neurons were predicted.
template <class T>
int64_t ffn_predicted_token(const Plan& p, const Predictor& predictor, const float* seen, const float* x, float* y,
                            float threshold) {
  const int64_t hidden = predictor.hidden;
  const float cutoff = (float)predictor.cutoff;
  int64_t num_live = 0;
  std::memset(p.live_count, 0, 2 * p.num_threads * sizeof(int64_t));
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share inner = share(hidden, t, threads), rows = share(p.F, t, threads);
    stream_rows(seen, (const T*)predictor.fc1, inner.begin, inner.end, p.D,
                [&](int64_t i, float value) { predictor.inner[i] = value > 0.0f ? value : 0.0f; });
    barrier(threads);
    int32_t* live = p.live_row + rows.begin;
    float* value = p.live_value + rows.begin;
    int64_t count = 0, predicted = 0;
    for (int64_t i = rows.begin; i < rows.end; i += kScreenRows) {
      int32_t chosen[kScreenRows];
      int64_t some = 0;
      stream_rows(predictor.inner, (const T*)predictor.fc2, i, least(i + kScreenRows, rows.end), hidden,
                  [&](int64_t row, float score) {
                    chosen[some] = (int32_t)row;
                    some += score >= cutoff;
                  });
      gates_of(p, (const T*)p.w_gate, chosen, some, x, threshold, [&](int64_t row, float gate) {
        live[count] = (int32_t)row;
        value[count++] = gate;
      });
      predicted += some;
    }
    up_and_down<T>(p, x, count, predicted, t, threads, y);
    if (t == 0) num_live = count_live(p, threads);
  });
  return num_live;
}

}  // namespace prosparse
