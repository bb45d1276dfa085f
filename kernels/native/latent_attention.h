// Attention of one row over the paged latent cache (`kernels/mla_decode.py` is the reference).
//
// A cache block has groups of 16 positions, whose latents are interleaved: [latent + rope][16]. So a vector holds one
// element of several positions; scores are no sums over lanes, and all reads are sequential. Values are summed over
// lanes once, at the end.

#pragma once
#include "vectors.h"

#define GROUP 16
#define GROUPS 4  // at a time: a block of 64 positions. It begins at a multiple of 64, whatever else is computed
#define BLOCK (GROUP * GROUPS)
#define PARTS (GROUP / LANES)  // vectors of a group
#define TOGETHER 8  // heads that read a block while it is in the cache

// One layer's cache as a sequence sees it: blocks of `slots` positions by the sequence's table.
typedef struct {
  float *cache;
  const int32_t *table;
  int32_t slots, latent, width;
} Latents;

INLINE float *group_of(const Latents *of, int position) {
  return of->cache + ((int64_t)of->table[position / of->slots] * of->slots + position % of->slots / GROUP * GROUP) * of->width;
}

static void write_latent(const Latents *of, int position, const float *latent) {
  float *group = group_of(of, position) + position % GROUP;
  for (int i = 0; i < of->width; i++) group[i * GROUP] = latent[i];
}

// p = scale q c of a block's positions, -infinity beyond `count`. Returns the largest, or `top` if that is larger.
INLINE float scores(const float *q, const float *const *groups, int width, int count, float scale, float top, float *p) {
  vec sum[GROUPS * PARTS], largest = (vec){0} + top;
#pragma GCC unroll 16
  for (int v = 0; v < GROUPS * PARTS; v++) sum[v] = (vec){0};
  for (int i = 0; i < width; i++)
#pragma GCC unroll 16
    for (int v = 0; v < GROUPS * PARTS; v++)
      sum[v] += *(const loose *)(groups[v / PARTS] + i * GROUP + v % PARTS * LANES) * q[i];
#pragma GCC unroll 16
  for (int v = 0; v < GROUPS * PARTS; v++) *(loose *)(p + v * LANES) = sum[v] * scale;
  for (int l = count; l < BLOCK; l++) p[l] = -INFINITY;
  for (int l = 0; l < BLOCK; l += LANES) largest = larger(*(const loose *)(p + l), largest);
  for (int j = 0; j < LANES; j++) top = largest[j] > top ? largest[j] : top;
  return top;
}

// mixed = mixed * keep + p c, by element and lane: [latent][16].
INLINE void mix(float *mixed, float keep, const float *p, const float *const *groups, int latent) {
  vec weights[GROUPS * PARTS];
#pragma GCC unroll 16
  for (int v = 0; v < GROUPS * PARTS; v++) weights[v] = *(const loose *)(p + v * LANES);
  for (int i = 0; i < latent; i++)
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) {
      loose *to = (loose *)(mixed + i * GROUP + part * LANES);
      vec sum = *to * keep;
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++)
        sum += *(const loose *)(groups[g] + i * GROUP + part * LANES) * weights[g * PARTS + part];
      *to = sum;
    }
}

// softmax(scale q c^T) c over the positions [0, last], for up to TOGETHER heads. q: [latent + rope] each, out: [latent]
// each, at their strides. mixed: room for TOGETHER x latent x 16 floats.
static void attend(const Latents *of, int last, float scale, int heads, const float *q, int64_t q_stride, float *out,
                   int64_t out_stride, float *mixed) {
  float top[TOGETHER], sum[TOGETHER], p[BLOCK];
  int each = of->latent * GROUP;
  for (int h = 0; h < heads; h++) top[h] = -INFINITY, sum[h] = 0;
  memset(mixed, 0, sizeof(float) * heads * each);
  for (int first = 0; first <= last; first += BLOCK) {
    int count = last + 1 - first < BLOCK ? last + 1 - first : BLOCK;
    const float *groups[GROUPS];
    for (int g = 0; g < GROUPS; g++) groups[g] = group_of(of, first + (g * GROUP < count ? g * GROUP : 0));
    for (int h = 0; h < heads; h++) {
      float highest = scores(q + h * q_stride, groups, of->width, count, scale, top[h], p);
      vec total_of = {0};
      for (int l = 0; l < BLOCK; l += LANES) total_of += *(loose *)(p + l) = exponential(*(const loose *)(p + l) - highest);
      float keep = exponential((vec){0} + (top[h] - highest))[0];
      sum[h] = sum[h] * keep + total(total_of);
      top[h] = highest;
      mix(mixed + h * each, keep, p, groups, of->latent);
    }
  }
  for (int h = 0; h < heads; h++)
    for (int i = 0; i < of->latent; i++) {
      vec lanes = {0};
      for (int part = 0; part < PARTS; part++) lanes += *(const loose *)(mixed + h * each + i * GROUP + part * LANES);
      out[h * out_stride + i] = total(lanes) / sum[h];
    }
}
