// Native CPU kernels of the sparse gated FFN. Built on first use by kernels/build.py, called by kernels/cpu.py (ctypes).
//
//   g = x Wg^T;  s = g where kept, else 0;  x1 = s * (x Wu^T);  y = x1 Wd^T     (Wd^T is stored, [F, D])
//
// Every matrix is [F, D] row-major, so a dead neuron is one row that is never read. Weights are float32, bfloat16 or
// float16, vectors and sums float32.
//
// Determinism: a row's dot product is summed in the same order wherever the row falls, and y in parts that d_ff alone
// decides, added in order. So no bit of a token's results depends on the number of threads or on the tokens beside it.
#include <cstdint>
#include <cstring>

#include "decode.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using namespace prosparse;

template <class T>
void gemv(const T* W, const float* x, float* out, int64_t rows, int64_t D, int64_t num_threads) {
  parallel(num_threads, [&](int64_t t, int64_t threads) {
    const Share mine = share(rows, t, threads);
    stream_rows(x, W, mine.begin, mine.end, D, [&](int64_t i, float dot) { out[i] = dot; });
  });
}

template <class T>
struct Tag {
  typedef T Type;
};
// use(Tag<T>()) for the type of the weights
template <class Use>
inline auto with_type(int64_t dtype, Use use) {
  return dtype == 0 ? use(Tag<float>()) : dtype == 1 ? use(Tag<BFloat16>()) : use(Tag<Float16>());
}

// The sum of `blocks` blocks of 4 * kStep floats, read as S streams side by side; what S does not divide comes last.
template <int S>
float read_streams(const float* data, int64_t blocks, int64_t ahead) {
  constexpr int64_t block = 4 * kStep;
  const int64_t each = blocks / S;
  Vec sums[8] = {};
  const auto add = [&](const float* p) {
    for (int i = 0; i < 8; i++) sums[i] += load(p + i * kLanes);
    if (ahead)
      for (int i = 0; i < 4; i++) prefetch(p + ahead + i * kStep);
  };
  for (int64_t b = 0; b < each; b++)
    for (int s = 0; s < S; s++) add(data + (s * each + b) * block);
  for (int64_t b = S * each; b < blocks; b++) add(data + b * block);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

// use(first token, number of tokens) for every kTokens of them
template <class Use>
inline int64_t in_batches(int64_t tokens, Use use) {
  int64_t total = 0;
  for (int64_t b = 0; b < tokens; b += kTokens) total += use(b, least(kTokens, tokens - b));
  return total;
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
int64_t psk_batch() { return kTokens; }
int64_t psk_parts() { return kParts; }
int64_t psk_screen_step() { return kScreenStep; }

// The functions of x return -1, having done nothing, where x holds a NaN or an infinity.

// x [tokens, D] -> s [tokens, F]
int64_t psk_gate(const Plan* p, const float* x, float* s, float threshold, int64_t tokens) {
  if (!all_finite(x, tokens * p->D)) return -1;
  return with_type(p->dtype, [&](auto tag) {
    typedef typename decltype(tag)::Type T;
    return in_batches(tokens, [&](int64_t b, int64_t n) {
      n == 1 ? gate_token<T>(*p, x + b * p->D, s + b * p->F, threshold)
             : gate_batch<T>(*p, x + b * p->D, s + b * p->F, threshold, n);
      return 0;
    });
  });
}

// s [tokens, F], x [tokens, D] -> x1 [tokens, F]
int64_t psk_s2(const Plan* p, const float* s, const float* x, float* x1, int64_t tokens) {
  if (!all_finite(x, tokens * p->D)) return -1;
  return with_type(p->dtype, [&](auto tag) {
    typedef typename decltype(tag)::Type T;
    return in_batches(tokens, [&](int64_t b, int64_t n) {
      n == 1 ? s2_token<T>(*p, s + b * p->F, x + b * p->D, x1 + b * p->F)
             : s2_batch<T>(*p, s + b * p->F, x + b * p->D, x1 + b * p->F, n);
      return 0;
    });
  });
}

// x1 [tokens, F] -> y [tokens, D]
void psk_s3(const Plan* p, const float* x1, float* y, int64_t tokens) {
  with_type(p->dtype, [&](auto tag) {
    typedef typename decltype(tag)::Type T;
    return in_batches(tokens, [&](int64_t b, int64_t n) {
      n == 1 ? s3_token<T>(*p, x1 + b * p->F, y + b * p->D) : s3_batch<T>(*p, x1 + b * p->F, y + b * p->D, n);
      return 0;
    });
  });
}

// x [tokens, D] -> y [tokens, D]; returns the number of live neurons, summed over the tokens
int64_t psk_ffn(const Plan* p, const float* x, float* y, float threshold, int64_t tokens) {
  if (!all_finite(x, tokens * p->D)) return -1;
  return with_type(p->dtype, [&](auto tag) {
    typedef typename decltype(tag)::Type T;
    return in_batches(tokens, [&](int64_t b, int64_t n) {
      const float* of = x + b * p->D;
      float* to = y + b * p->D;
      if (n > 1) return ffn_batch<T>(*p, of, to, threshold, n);
      return p->skip_dead ? ffn_token<T>(*p, of, to, threshold) : ffn_dense_token<T>(*p, of, to, threshold);
    });
  });
}

// W [rows, D], x [D] -> out [rows]
void psk_gemv(const void* W, const float* x, float* out, int64_t rows, int64_t D, int64_t dtype, int64_t num_threads) {
  with_type(dtype, [&](auto tag) {
    gemv((const typename decltype(tag)::Type*)W, x, out, rows, D, num_threads);
    return 0;
  });
}

// Tokens [n], n <= kTokens, of a whole model; see decode.h. The caller has checked that they and the positions exist.
int64_t psk_decode(const Decoder* m, const int64_t* tokens, int64_t n, int64_t position, int64_t num_logits,
                   int64_t* counts) {
  return with_type(m->dtype, [&](auto tag) {
    return decode<typename decltype(tag)::Type>(*m, tokens, n, position, num_logits, counts);
  });
}

// Reads n floats once (whole blocks of 4 * kStep), each thread its share as `streams` streams side by side, with
// prefetching `ahead` floats before them (0: without); the sum is returned so that the reads cannot be removed.
float psk_read(const float* data, int64_t n, int64_t streams, int64_t ahead, int64_t num_threads) {
  float total = 0.0f;
  parallel(num_threads, [&](int64_t t, int64_t threads) {
    const Share mine = share(n / (4 * kStep), t, threads);
    const float* from = data + mine.begin * 4 * kStep;
    const int64_t blocks = mine.end - mine.begin;
    const float mine_sum = streams == 2   ? read_streams<2>(from, blocks, ahead)
                           : streams == 4 ? read_streams<4>(from, blocks, ahead)
                           : streams == 8 ? read_streams<8>(from, blocks, ahead)
                                          : read_streams<1>(from, blocks, ahead);
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
