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
void send(const Array<float>& array) { std::fwrite(array.get(), sizeof(float), array.size, stdout); }

}  // namespace

int main() {
  Case c;
  while (std::fread(&c, sizeof c, 1, stdin) == 1) {
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
    std::fflush(stdout);
  }
  return 0;
}
