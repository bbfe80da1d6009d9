// Runs the native kernels under the address and undefined-behaviour sanitizers: cases on stdin, results on stdout, until
// stdin ends. Every array is an allocation of its own and of its exact size, so one value too far ends the process.
// tests/kernels/test_sanitized.py writes the cases.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "../../kernels/cpu.cpp"

namespace {

struct Case {
  int64_t D, F, num_threads, dtype, skip_dead, tokens, screen_width, cut_x;
  double threshold, screen_floor;
};

struct DecodeCase {
  int64_t D, F, heads, kv_heads, head_dim, vocab, capacity, num_threads, dtype, skip_dead, silu, tokens, hidden,
      screen_width, extras, window;
  double threshold, cutoff, screen_floor;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
struct Array {  // malloc(0) included: nobody may touch it
  std::unique_ptr<T, Free> memory;
  int64_t size;
  explicit Array(int64_t n) : memory((T*)std::malloc(n * sizeof(T))), size(n) { std::memset(get(), 0x7f, n * sizeof(T)); }
  T* get() const { return memory.get(); }
};

template <class T>
Array<T> receive(int64_t n) {
  Array<T> array(n);
  if ((int64_t)std::fread(array.get(), sizeof(T), n, stdin) != n) std::exit(3);
  return array;
}
template <class T>
bool receive_one(T* to) {
  return std::fread(to, sizeof(T), 1, stdin) == 1;
}
void send(const Array<float>& array) { std::fwrite(array.get(), sizeof(float), array.size, stdout); }

void run_ffn(const Case& c) {
  const int64_t bytes = c.dtype == 0 ? 4 : 2, batch = c.tokens > 1 ? kTokens : 1;
  Array<float> x = receive<float>(c.tokens * c.D - c.cut_x);
  Array<uint8_t> gate = receive<uint8_t>(c.F * c.D * bytes), up = receive<uint8_t>(c.F * c.D * bytes),
                 down = receive<uint8_t>(c.F * c.D * bytes), bounds = receive<uint8_t>(c.screen_width ? 16 * c.F : 0);
  Array<int8_t> screen = receive<int8_t>(c.F * c.screen_width);
  const int64_t stride = (c.D + 15) / 16 * 16;
  Array<int32_t> live_row(c.F);
  Array<float> live_value(c.F), dense(batch * c.F), partial((c.num_threads > 1 ? kParts : 1) * batch * stride);
  Array<int64_t> live_count(2 * c.num_threads);
  Array<uint8_t> screen_x(2 * c.screen_width);
  const Plan plan = {gate.get(), up.get(), down.get(), c.F, c.D, c.num_threads, c.dtype, c.skip_dead, live_row.get(),
                     live_value.get(), live_count.get(), dense.get(), partial.get(), stride,
                     c.screen_width ? screen.get() : nullptr, (const RowBound*)bounds.get(), screen_x.get(),
                     c.screen_width, c.screen_floor};
  Array<float> s(c.tokens * c.F), x1(c.tokens * c.F), y(c.tokens * c.D), whole(c.tokens * c.D), first(c.F);
  psk_gate(&plan, x.get(), s.get(), (float)c.threshold, c.tokens);
  psk_s2(&plan, s.get(), x.get(), x1.get(), c.tokens);
  psk_s3(&plan, x1.get(), y.get(), c.tokens);
  psk_ffn(&plan, x.get(), whole.get(), (float)c.threshold, c.tokens);
  if (c.tokens > 0) psk_gemv(gate.get(), x.get(), first.get(), c.F, c.D, c.dtype, c.num_threads);
  for (const Array<float>* array : {&s, &x1, &y, &whole, &first}) send(*array);
}

// Two layers of the same weights; `extras` are biases and norms of heads.
void run_decoder(const DecodeCase& c) {
  const int64_t bytes = c.dtype == 0 ? 4 : 2, q = c.heads * c.head_dim, k = c.kv_heads * c.head_dim;
  Array<int64_t> tokens = receive<int64_t>(c.tokens);
  Array<uint8_t> embedding = receive<uint8_t>(c.vocab * c.D * bytes), qkv = receive<uint8_t>((q + 2 * k) * c.D * bytes),
                 out = receive<uint8_t>(c.D * q * bytes), gate = receive<uint8_t>(c.F * c.D * bytes),
                 up = receive<uint8_t>(c.F * c.D * bytes), down = receive<uint8_t>(c.F * c.D * bytes),
                 fc1 = receive<uint8_t>(c.hidden * c.D * bytes), fc2 = receive<uint8_t>(c.F * c.hidden * bytes);
  Array<float> norm = receive<float>(c.D), cos = receive<float>(c.capacity * c.head_dim),
               sin = receive<float>(c.capacity * c.head_dim), qkv_bias = receive<float>(c.extras * (q + 2 * k)),
               out_bias = receive<float>(c.extras * c.D), head_norm = receive<float>(c.extras * c.head_dim);
  Array<uint8_t> bounds = receive<uint8_t>(c.screen_width ? 16 * c.F : 0);
  Array<int8_t> screen = receive<int8_t>(c.F * c.screen_width);
  const int64_t stride = (c.D + 15) / 16 * 16;
  Array<int32_t> live_row(c.F);
  Array<float> live_value(c.F), dense(kTokens * c.F), partial((c.num_threads > 1 ? kParts : 1) * kTokens * stride);
  Array<int64_t> live_count(2 * c.num_threads);
  Array<uint8_t> screen_x(2 * c.screen_width);
  Array<float> inner(c.hidden), keys(2 * k * c.capacity), values(2 * k * c.capacity);
  const Predictor predictor = {fc1.get(), fc2.get(), inner.get(), c.hidden, 1, c.cutoff};
  Layer layers[2];
  for (int64_t l = 0; l < 2; l++)
    layers[l] = {norm.get(), norm.get(), qkv.get(), out.get(), c.extras ? qkv_bias.get() : nullptr,
                 c.extras ? out_bias.get() : nullptr, c.extras ? head_norm.get() : nullptr,
                 c.extras ? head_norm.get() : nullptr, keys.get() + l * k * c.capacity,
                 values.get() + l * k * c.capacity, c.window, c.threshold, c.hidden ? &predictor : nullptr,
                 {gate.get(), up.get(), down.get(), c.F, c.D, c.num_threads, c.dtype, c.skip_dead, live_row.get(),
                  live_value.get(), live_count.get(), dense.get(), partial.get(), stride,
                  c.screen_width ? screen.get() : nullptr, (const RowBound*)bounds.get(), screen_x.get(),
                  c.screen_width, c.screen_floor}};
  Array<float> x(kTokens * c.D), normed(kTokens * c.D), y(kTokens * c.D), rows(kTokens * (q + 2 * k)),
      mixed(kTokens * q), scores(c.num_threads * c.capacity), logits(kTokens * c.vocab), all(c.tokens * c.vocab);
  const Decoder decoder = {layers, 2, c.D, c.heads, c.kv_heads, c.head_dim, c.vocab, c.capacity, c.num_threads, c.dtype,
                           c.silu, embedding.get(), embedding.get(), norm.get(), cos.get(), sin.get(), 1e-5,
                           1.0 / std::sqrt((double)c.head_dim), x.get(), normed.get(), y.get(), rows.get(), mixed.get(),
                           scores.get(), logits.get()};
  int64_t counts[2] = {0, 0};
  for (int64_t at = 0; at < c.tokens; at += kTokens) {
    const int64_t n = least(kTokens, c.tokens - at);
    if (psk_decode(&decoder, tokens.get() + at, n, at, n, counts) >= 0) std::exit(4);
    std::memcpy(all.get() + at * c.vocab, logits.get(), n * c.vocab * sizeof(float));
  }
  send(all);
}

}  // namespace

int main() {
  int64_t is_decoder;
  while (receive_one(&is_decoder)) {
    Case c;
    DecodeCase d;
    if (is_decoder ? receive_one(&d) : receive_one(&c)) is_decoder ? run_decoder(d) : run_ffn(c);
    std::fflush(stdout);
  }
  return 0;
}
