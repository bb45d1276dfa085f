// Sigmoid routing with a selection bias and a group limit (`kernels/router.py` is the reference).

#pragma once
#include <math.h>
#include <stdint.h>

typedef struct {
  int32_t experts, top_k, groups, top_groups, normalize;
  float scale;
} Router;

// The experts of one row, best biased score first, the lower id first among equal ones, and their weights. scores: the
// logits, replaced by the scores. choice: room for as many.
static void route(const Router *r, const float *bias, float *scores, float *choice, int32_t *ids, float *weights) {
  int members = r->experts / r->groups;
  for (int e = 0; e < r->experts; e++) {
    scores[e] = 1.0f / (1.0f + expf(-scores[e]));
    choice[e] = scores[e] + bias[e];
  }
  if (r->top_groups < r->groups) {
    float group[r->groups];
    for (int g = 0; g < r->groups; g++) {
      float first = -INFINITY, second = -INFINITY;
      for (int e = g * members; e < (g + 1) * members; e++) {
        if (choice[e] > first) second = first, first = choice[e];
        else if (choice[e] > second) second = choice[e];
      }
      group[g] = first + second;
    }
    for (int dropped = r->groups - r->top_groups; dropped; dropped--) {  // the lowest group, the last among equal ones
      int worst = -1;
      for (int g = 0; g < r->groups; g++)
        if (group[g] != INFINITY && (worst < 0 || group[g] <= group[worst])) worst = g;
      if (worst < 0) break;
      group[worst] = INFINITY;
      for (int e = worst * members; e < (worst + 1) * members; e++) choice[e] = -INFINITY;
    }
  }
  float sum = 0;
  for (int k = 0; k < r->top_k; k++) {
    int best = -1;
    for (int e = 0; e < r->experts; e++) {
      int taken = 0;
      for (int before = 0; before < k; before++) taken |= ids[before] == e;
      if (!taken && (best < 0 || choice[e] > choice[best])) best = e;
    }
    ids[k] = best;
    sum += weights[k] = scores[best];
  }
  for (int k = 0; k < r->top_k; k++) weights[k] = (r->normalize ? weights[k] / (sum + 1e-20f) : weights[k]) * r->scale;
}
