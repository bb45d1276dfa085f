// Products with matrices packed as panels of 32 outputs, [inputs][32] each, in FP32, BF16 or INT8.
//
// A row of x reads the weights in the order of memory, and no output is a sum over lanes. An output is a sum over the
// inputs in order, even and odd ones apart, whatever the number of rows: its bits depend on its own row only.

#pragma once
#include "vectors.h"

#define PANEL 32

enum { F32, BF16, INT8 };

// A stack of matrices of one shape. scales: one per output, padded like the panels; of INT8 only.
typedef struct {
  const void *panels;
  const float *scales;
  int32_t outputs, inputs, format;
} Matrix;

INLINE int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

INLINE vec weights(const void *panels, int64_t at, int format) {
  if (format == F32) return *(const loose *)((const float *)panels + at);
  if (format == BF16) return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)panels + at), ivec) << 16);
  const int8_t *from = (const int8_t *)panels + at;
#if BYTES == 64
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif BYTES == 32
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
  return __builtin_convertvector(*(const bytes *)from, vec);
#endif
}

// One panel's outputs of `rows` rows, J vectors of it at a time. `rows`, J and `format` are constants.
INLINE void tile(const int rows, const int J, const int format, float *const *y, const float *const *x, const void *panel,
                 const float *scales, int inputs) {
  for (int lane = 0; lane < PANEL; lane += J * LANES) {
    vec sum[4][PANEL / LANES][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) sum[r][j][0] = sum[r][j][1] = (vec){0};
    for (int k = 0; k < inputs; k += 2) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; odd++) {
        if (odd && k + 1 == inputs) break;
        vec w[PANEL / LANES];
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) w[j] = weights(panel, (int64_t)(k + odd) * PANEL + lane + j * LANES, format);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
          for (int j = 0; j < J; j++) sum[r][j][odd] += w[j] * x[r][k + odd];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) {
        vec out = sum[r][j][0] + sum[r][j][1];
        if (format == INT8) out *= *(const loose *)(scales + lane + j * LANES);
        *(loose *)(y[r] + lane + j * LANES) = out;
      }
  }
}

// Rows of activations. index: the row to take for each, or NULL for all in order.
typedef struct { float *base; int64_t stride; const int32_t *index; } Rows;

INLINE float *row(Rows rows, int r) { return rows.base + (rows.index ? rows.index[r] : r) * rows.stride; }

INLINE void panel_of(const int format, const Matrix *m, int number, int panel, Rows y, Rows x, int rows) {
  int64_t size = m->inputs * PANEL, first = (number * (padded(m->outputs) / PANEL) + panel) * size;
  const void *from = (const char *)m->panels + first * (format == F32 ? 4 : format == BF16 ? 2 : 1);
  const float *scales = m->scales ? m->scales + number * padded(m->outputs) + panel * PANEL : NULL;
  for (int r = 0; r < rows;) {
    float *to[4];
    const float *of[4];
    int together = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
    for (int i = 0; i < together; i++) of[i] = row(x, r + i), to[i] = row(y, r + i) + panel * PANEL;
    // As many sums as fit the registers: 16 of 32 with AVX-512, 8 of 16 with AVX2.
    if (together == 4) tile(4, BYTES == 32 ? 1 : 2, format, to, of, from, scales, m->inputs);
    else if (together == 2) tile(2, 2, format, to, of, from, scales, m->inputs);
    else tile(1, BYTES == 64 ? 2 : 4, format, to, of, from, scales, m->inputs);
    r += together;
  }
}

static void panel_product(const Matrix *m, int number, int panel, Rows y, Rows x, int rows) {
  if (m->format == F32) panel_of(F32, m, number, panel, y, x, rows);
  else if (m->format == BF16) panel_of(BF16, m, number, panel, y, x, rows);
  else panel_of(INT8, m, number, panel, y, x, rows);
}

INLINE int panels(const Matrix *m) { return (int)(padded(m->outputs) / PANEL); }
