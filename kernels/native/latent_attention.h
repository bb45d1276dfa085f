// Attention of one row and head over the paged latent cache (`kernels/mla_decode.py` is the reference).

#pragma once
#include "vectors.h"

#define BLOCK 64  // positions at a time, beginning at multiples of it, so that a row's bits depend on its position only

// Scores of LANES positions: q . latent. Lane l of `sum16`'s result is the sum of the lanes of a[l].
INLINE vec scores_of(const float *q, const float *const *latents, int width) {
  vec sum[LANES];
  float rest[LANES] = {0};
#pragma GCC unroll 16
  for (int l = 0; l < LANES; l++) sum[l] = (vec){0};
  int i = 0;
  for (; i + LANES <= width; i += LANES) {
    vec part = *(const loose *)(q + i);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) sum[l] += part * *(const loose *)(latents[l] + i);
  }
  for (; i < width; i++)
    for (int l = 0; l < LANES; l++) rest[l] += q[i] * latents[l][i];
  // A transposing sum: each round adds neighbours and halves the vectors.
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2)
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l += 2 * step) {
      ivec low, high;
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++) {
        int from = j & ~step;  // lane j of the sum takes lanes j and j ^ step of a, or of b
        low[j] = (j & step ? LANES : 0) + from;
        high[j] = (j & step ? LANES : 0) + from + step;
      }
      sum[l] = __builtin_shuffle(sum[l], sum[l + step], low) + __builtin_shuffle(sum[l], sum[l + step], high);
    }
  return sum[0] + *(const loose *)rest;
}

// One layer's cache as a sequence sees it: blocks of `slots` positions, [latent + rope] each, by the sequence's table.
typedef struct {
  const float *cache;
  const int32_t *table;
  int32_t slots, latent, width;
} Latents;

// out = out * keep + p c, for J vectors of the latent from `first` on. J is a constant.
INLINE void mix(const int J, float *out, float keep, const float *p, const float *const *latents, int count, int first) {
  vec sum[4];
#pragma GCC unroll 4
  for (int j = 0; j < J; j++) sum[j] = *(loose *)(out + first + j * LANES) * keep;
  for (int l = 0; l < count; l++)
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) sum[j] += *(const loose *)(latents[l] + first + j * LANES) * p[l];
#pragma GCC unroll 4
  for (int j = 0; j < J; j++) *(loose *)(out + first + j * LANES) = sum[j];
}

// The scores of a block of positions -> p, their softmax without the division; returns its sum. Rescales *top.
static float block_softmax(const float *q, const float *const *latents, int width, int count, float scale, float *p, float *top) {
  vec largest = (vec){0} - INFINITY, sum = {0};
  for (int l = 0; l < count; l += LANES) {
    *(loose *)(p + l) = scores_of(q, latents + l, width) * scale;
    for (int j = l; j < l + LANES; j++) if (j >= count) p[j] = -INFINITY;
    largest = larger(*(const loose *)(p + l), largest);
  }
  for (int j = 0; j < LANES; j++) *top = largest[j] > *top ? largest[j] : *top;
  for (int l = 0; l < count; l += LANES) sum += *(loose *)(p + l) = exponential(*(const loose *)(p + l) - *top);
  return total(sum);
}

// out = softmax(scale q c^T) c over the positions [0, last]. q: [latent + rope]. out: [latent, whole vectors].
static void attend(const Latents *of, int last, float scale, const float *q, float *out) {
  int end = (of->latent + LANES - 1) / LANES * LANES;
  float top = -INFINITY, sum = 0;
  for (int i = 0; i < end; i += LANES) *(loose *)(out + i) = (vec){0};
  for (int first = 0; first <= last; first += BLOCK) {
    int count = last + 1 - first < BLOCK ? last + 1 - first : BLOCK;
    const float *latents[BLOCK];
    for (int l = 0; l < BLOCK; l++) {
      int position = first + (l < count ? l : 0);
      latents[l] = of->cache + ((int64_t)of->table[position / of->slots] * of->slots + position % of->slots) * of->width;
    }
    float p[BLOCK], before = top;
    float part = block_softmax(q, latents, of->width, count, scale, p, &top);
    float keep = exponential((vec){0} + (before - top))[0];
    sum = sum * keep + part;
    int i = 0;
    for (; i + 4 * LANES <= end; i += 4 * LANES) mix(4, out, keep, p, latents, count, i);
    for (; i < end; i += LANES) mix(1, out, keep, p, latents, count, i);
  }
  for (int i = 0; i < end; i += LANES) *(loose *)(out + i) /= (vec){0} + sum;
}
