// One call for one to eight tokens of a whole LLaMA-like model: embedding, attention over a key-value cache, gated FFN,
// output layer. Matrices are float32, bfloat16 or float16, everything else float32.
//
// No bit depends on the number of threads, nor on how many tokens share a call, nor on how the FFN skips its dead rows.
#pragma once
#include <cmath>

#include "cpu_batch.h"
#include "cpu_predict.h"

namespace prosparse {

struct Layer {  // mirrored by kernels/decoder.py: _Layer
  const float *attention_norm, *ffn_norm;  // [D]
  const void *qkv, *out;                   // [(heads + 2 kv_heads) * head_dim, D], [D, heads * head_dim]
  const float *qkv_bias, *out_bias;        // null: none
  const float *q_norm, *k_norm;            // [head_dim], over each head; null: none
  float *keys, *values;                    // [kv_heads, capacity, head_dim]
  int64_t window;                          // positions that a token sees, itself included; 0: all before it
  double threshold;
  const Predictor* predictor;              // null: none
  Plan ffn;
};

struct Decoder {  // mirrored by kernels/decoder.py: _Decoder
  const Layer* layers;
  int64_t num_layers, D, heads, kv_heads, head_dim, vocab, capacity, num_threads, dtype;
  int64_t silu;                     // 1: a dense FFN with SiLU instead of ReLU
  const void *embedding, *lm_head;  // [vocab, D]
  const float *final_norm, *cos, *sin;  // [D], [capacity, head_dim]
  double eps, scale;                // of the norms, of the attention's scores
  float *x, *normed, *y;            // [kTokens, D]
  float *qkv, *mixed;               // [kTokens, (heads + 2 kv_heads) * head_dim], [kTokens, heads * head_dim]
  float *scores;                    // [num_threads, capacity]
  float *logits;                    // [kTokens, vocab]
};

// y[token, row] = dot(W[row], x[token]) (+ bias)
template <class T>
void product(const Decoder& m, const void* W, const float* bias, const float* x, float* y, int64_t rows, int64_t width,
             int64_t tokens) {
  parallel(m.num_threads, [&](int64_t t, int64_t threads) {
    const Share mine = share(rows, t, threads);
    if (tokens == 1)
      stream_rows(x, (const T*)W, mine.begin, mine.end, width, [&](int64_t i, float dot) { y[i] = dot; });
    else
      product_rows((const T*)W, x, width, tokens, mine,
                   [&](int64_t i, int64_t b, float dot) { y[b * rows + i] = dot; });
    if (!bias) return;
    for (int64_t b = 0; b < tokens; b++)
      for (int64_t i = mine.begin; i < mine.end; i++) y[b * rows + i] += bias[i];
  });
}

// y = x / sqrt(mean of squares + eps) * weight; y may be x
inline void rms_norm(const float* x, const float* weight, float* y, int64_t D, double eps) {
  Vec squares = {};
  int64_t k = 0;
  for (; k + kLanes <= D; k += kLanes) squares = squares + load(x + k) * load(x + k);
  if (k < D) squares = squares + load_part(x + k, D - k) * load_part(x + k, D - k);
  const float factor = 1.0f / std::sqrt(sum(squares) / (float)D + (float)eps);
  for (k = 0; k < D; k++) y[k] = x[k] * factor * weight[k];
}

// Turns each pair (k, k + half) of a head by its angle at this position.
inline void rotate(float* head, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t k = 0; k < half; k++) {
    const float first = head[k], second = head[k + half];
    head[k] = first * cos[k] - second * sin[k];
    head[k + half] = second * cos[k + half] + first * sin[k + half];
  }
}

// Norms and turns queries and keys of one token, and puts its keys and values into the cache.
inline void place(const Decoder& m, const Layer& layer, float* qkv, int64_t position) {
  const int64_t d = m.head_dim;
  for (int64_t h = 0; h < m.heads + m.kv_heads; h++) {
    float* head = qkv + h * d;
    const float* norm = h < m.heads ? layer.q_norm : layer.k_norm;
    if (norm) rms_norm(head, norm, head, d, m.eps);
    rotate(head, m.cos + position * d, m.sin + position * d, d);
  }
  for (int64_t g = 0; g < m.kv_heads; g++) {
    const int64_t to = (g * m.capacity + position) * d;
    std::memcpy(layer.keys + to, qkv + (m.heads + g) * d, d * sizeof(float));
    std::memcpy(layer.values + to, qkv + (m.heads + m.kv_heads + g) * d, d * sizeof(float));
  }
}

// mixed[head_dim] = softmax(q keys^T * scale) values, over the positions this token sees
inline void attend(const Decoder& m, const Layer& layer, const float* q, int64_t h, int64_t position, float* scores,
                   float* mixed) {
  const int64_t d = m.head_dim, group = h / (m.heads / m.kv_heads) * m.capacity;
  const int64_t first = layer.window && position + 1 > layer.window ? position + 1 - layer.window : 0;
  const float *keys = layer.keys + (group + first) * d, *values = layer.values + (group + first) * d;
  const int64_t count = position + 1 - first;
  float largest = -HUGE_VALF, total = 0.0f;
  in_groups(count, [&](int64_t i, auto size) {
    const float* row[size.value];
    for (int64_t r = 0; r < size.value; r++) row[r] = keys + (i + r) * d;
    dot_rows<size.value, 0>(q, row, row, d, scores + i);
  });
  for (int64_t i = 0; i < count; i++) {
    scores[i] *= (float)m.scale;
    largest = scores[i] > largest ? scores[i] : largest;
  }
  for (int64_t i = 0; i < count; i++) {
    scores[i] = std::exp(scores[i] - largest);
    total += scores[i];
  }
  for (int64_t i = 0; i < count; i++) scores[i] /= total;
  std::memset(mixed, 0, d * sizeof(float));
  in_groups(count, [&](int64_t i, auto size) {
    const float* row[size.value];
    for (int64_t r = 0; r < size.value; r++) row[r] = values + (i + r) * d;
    add_rows<size.value, 0>(mixed, row, scores + i, row, d);
  });
}

template <class T>
void silu_token(const Plan& p, const float* x, float* y) {
  float* s = p.dense;
  parallel(p.num_threads, [&](int64_t t, int64_t threads) {
    const Share rows = share(p.F, t, threads);
    stream_rows(x, (const T*)p.w_gate, rows.begin, rows.end, p.D,
                [&](int64_t i, float gate) { s[i] = gate / (1.0f + std::exp(-gate)); });
  });
  s2_token<T>(p, s, x, s);
  s3_token<T>(p, s, y);
}

// y = the FFN of m.normed; counts[0] += live neurons, counts[1] += gates computed
template <class T>
void feed_forward(const Decoder& m, const Layer& layer, int64_t tokens, int64_t* counts) {
  const Plan& p = layer.ffn;
  const float threshold = (float)layer.threshold;
  if (tokens > 1 && !m.silu && !layer.predictor) {
    counts[0] += ffn_batch<T>(p, m.normed, m.y, threshold, tokens);
    counts[1] += tokens * p.F;
    return;
  }
  for (int64_t b = 0; b < tokens; b++) {
    const float* x = m.normed + b * m.D;
    float* y = m.y + b * m.D;
    if (m.silu) {
      silu_token<T>(p, x, y);
      counts[0] += p.F, counts[1] += p.F;
      continue;
    }
    if (layer.predictor) {
      const float* seen = layer.predictor->pre_norm ? m.x + b * m.D : x;
      counts[0] += ffn_predicted_token<T>(p, *layer.predictor, seen, x, y, threshold);
    } else {
      counts[0] += p.skip_dead ? ffn_token<T>(p, x, y, threshold) : ffn_dense_token<T>(p, x, y, threshold);
    }
    for (int64_t t = 0; t < p.num_threads; t++) counts[1] += p.live_count[p.num_threads + t];
  }
}

inline void add(float* x, const float* y, int64_t n) {
  for (int64_t k = 0; k < n; k++) x[k] += y[k];
}

// Up to kTokens tokens from `position` on; logits [num_logits, vocab] of the last num_logits of them. Returns -1, or the
// layer after which a number is no longer finite.
template <class T>
int64_t decode(const Decoder& m, const int64_t* tokens, int64_t n, int64_t position, int64_t num_logits,
               int64_t* counts) {
  const int64_t q_width = m.heads * m.head_dim, qkv_width = q_width + 2 * m.kv_heads * m.head_dim;
  for (int64_t b = 0; b < n; b++) {
    const T* row = (const T*)m.embedding + tokens[b] * m.D;
    float* x = m.x + b * m.D;
    for (int64_t k = 0; k < m.D; k += kLanes) {
      const int64_t some = least(kLanes, m.D - k);
      const Vec part = load_part(row + k, some);
      std::memcpy(x + k, &part, some * sizeof(float));
    }
  }
  for (int64_t l = 0; l < m.num_layers; l++) {
    const Layer& layer = m.layers[l];
    for (int64_t b = 0; b < n; b++) rms_norm(m.x + b * m.D, layer.attention_norm, m.normed + b * m.D, m.D, m.eps);
    product<T>(m, layer.qkv, layer.qkv_bias, m.normed, m.qkv, qkv_width, m.D, n);
    for (int64_t b = 0; b < n; b++) place(m, layer, m.qkv + b * qkv_width, position + b);
    parallel(m.num_threads, [&](int64_t t, int64_t threads) {
      const Share mine = share(n * m.heads, t, threads);
      for (int64_t i = mine.begin; i < mine.end; i++) {
        const int64_t b = i / m.heads, h = i % m.heads;
        attend(m, layer, m.qkv + b * qkv_width + h * m.head_dim, h, position + b, m.scores + t * m.capacity,
               m.mixed + b * q_width + h * m.head_dim);
      }
    });
    product<T>(m, layer.out, layer.out_bias, m.mixed, m.y, m.D, q_width, n);
    add(m.x, m.y, n * m.D);
    for (int64_t b = 0; b < n; b++) rms_norm(m.x + b * m.D, layer.ffn_norm, m.normed + b * m.D, m.D, m.eps);
    feed_forward<T>(m, layer, n, counts);
    add(m.x, m.y, n * m.D);
    if (!all_finite(m.x, n * m.D)) return l;
  }
  if (num_logits == 0) return -1;
  const float* last = m.x + (n - num_logits) * m.D;
  for (int64_t b = 0; b < num_logits; b++) rms_norm(last + b * m.D, m.final_norm, m.normed + b * m.D, m.D, m.eps);
  product<T>(m, m.lm_head, nullptr, m.normed, m.logits, m.vocab, m.D, num_logits);
  return -1;
}

}  // namespace prosparse
