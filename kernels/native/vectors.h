// Vectors of floats as wide as the processor's, in GCC's vector extension.

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES (BYTES / 4)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(BYTES)));
typedef float loose __attribute__((vector_size(BYTES), aligned(4)));  // in memory, at any float
typedef int32_t ivec __attribute__((vector_size(BYTES)));
typedef uint16_t halves __attribute__((vector_size(BYTES / 2), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(BYTES / 4), aligned(1)));

INLINE float total(vec v) {
  float lanes[LANES];
  memcpy(lanes, &v, BYTES);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

INLINE vec larger(vec a, vec b) {
  ivec mask = a > b;
  return (vec)(((ivec)a & mask) | ((ivec)b & ~mask));
}

// e^x to 2e-7 relative, 0 below -87 and e^88 above 88. A polynomial (Cephes) after x = n ln 2 + r.
INLINE vec exponential(vec x) {
  const vec zero = {0}, magic = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  ivec kept = x >= zero - 87.0f;
  x = -larger(zero - 88.0f, -larger(x, zero - 87.0f));
  vec n = (x * 1.44269504f + magic) - magic;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec scale = (__builtin_convertvector(n, ivec) + 127) << 23;
  return (vec)((ivec)(p * (vec)scale) & kept);
}
