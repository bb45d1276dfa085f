// One forward of a DeepSeek-V3 model over the latent cache, for rows: tokens, each with its own sequence and position.
// Prompt chunks and single tokens of many sequences are rows of one call; nothing is padded.
//
// The law: the bits of a row's result depend on its own ids and weights only. They do not depend on the other rows, on
// how a prompt is cut, or on the number of threads. So every sum has one order: an output of a matrix is a sum over its
// inputs in order (even and odd ones apart), attention visits positions in blocks that begin at multiples of BLOCK, and
// a row's experts are added in the order of its slots.
//
// A matrix is packed as panels of 32 outputs, [inputs][32] each, so that a row reads weights sequentially and no output
// is a sum over lanes. Activations are FP32. Their rows are padded to multiples of 32 with zeros, so that no loop has a
// tail. All threads run the whole forward and share the work of each phase; a barrier ends it.
//
// Reference: `models/model.py`, forward_cached. Layout of the structs: `kernels/cached_step.py`.

#define _GNU_SOURCE
#include "native/latent_attention.h"
#include "native/panels.h"
#include "native/routing.h"
#include "native/team.h"

// key, value: the two halves of kv_b_proj, a matrix per head. gate, up, down: of the dense MLP or the shared expert,
// which may be absent (0 outputs). e_*: a matrix per expert. moe: whether there are experts.
typedef struct {
  Matrix q_a, q_b, kv_a, key, value, o, gate, up, down, router, e_gate, e_up, e_down;
  const float *attention_norm, *mlp_norm, *q_norm, *kv_norm, *bias;
  int32_t moe;
} Layer;

// q_rank: 0 if queries have no latent. rotary: [positions][rope] cosines and sines of the pairs, interleaved.
typedef struct {
  int32_t hidden, layers, heads, nope, rope, value, latent, q_rank;
  int32_t inner, expert_inner, vocab, embedding_format;
  float score_scale, eps, latent_eps;
  Router router;
  const void *embedding;
  const float *rotary, *final_norm;
  Matrix head;
  const Layer *layer;
} Model;

// A step's rows. tables: blocks of the cache. table: where in them the table of a row's sequence begins. wanted: the rows
// whose logits are computed, and whose states before the head are in hidden: [wanted][hidden padded].
// cache: [layer][block][group of 16 positions][latent + rope][16]; slots: positions of a block. logits: [wanted][vocab
// padded]. best: the largest logit's id by wanted row, -1 if one is not finite. load: [layer][expert], rows are added.
typedef struct {
  int32_t rows, wanted_rows, slots, tokens;
  const int32_t *ids, *positions, *table, *tables, *wanted;
  float *cache;
  int64_t layer_stride;
  float *logits, *hidden;
  int32_t *best;
  int64_t *load;
} Batch;

// x / rms(x) * weight. Rows are padded with zeros to whole vectors; x and y may be the same.
static void norm(float *y, const float *x, const float *weight, int width, float eps) {
  vec squares = {0};
  int end = (int)padded(width);
  for (int i = 0; i < end; i += LANES) squares += *(const loose *)(x + i) * *(const loose *)(x + i);
  float factor = 1.0f / sqrtf(total(squares) / width + eps);
  for (int i = 0; i < end; i += LANES) *(loose *)(y + i) = *(const loose *)(x + i) * factor * *(const loose *)(weight + i);
}

static void add(float *x, const float *y, int width) {
  for (int i = 0; i < padded(width); i += LANES) *(loose *)(x + i) += *(const loose *)(y + i);
}

// gate = silu(gate) * up * weight, for one panel.
static void gated(float *gate, const float *up, float weight) {
  for (int i = 0; i < PANEL; i += LANES) {
    vec g = *(loose *)(gate + i);
    *(loose *)(gate + i) = g / (1.0f + exponential(-g)) * *(const loose *)(up + i) * weight;
  }
}

// y = x m^T, one thread's share of it.
static void product(const Matrix *m, Rows y, Rows x, int rows, int thread, int threads) {
  Share mine = share(panels(m), thread, threads);
  for (int panel = mine.first; panel < mine.last; panel++) panel_product(m, 0, panel, y, x, rows);
}

static void rotate(float *y, const float *x, const float *turn, int pairs) {
  for (int i = 0; i < pairs; i++) {
    float even = x[2 * i], odd = x[2 * i + 1], cosine = turn[2 * i], sine = turn[2 * i + 1];
    y[2 * i] = even * cosine - odd * sine;
    y[2 * i + 1] = even * sine + odd * cosine;
  }
}

// ---- the forward

// Buffers of one step, in `scratch`. inner: rows of experts by place, wide enough for a dense MLP; up: the same.
typedef struct {
  float *x, *normed, *query_low, *query, *low, *absorbed, *mixed, *values, *head_values, *lanes, *out, *inner, *up, *outputs, *scores, *choice;
  float *weights, *placed_weights;
  int32_t *ids, *places, *rows;  // of each slot: its expert, its place; of each place: its row
  int32_t *first;                // of each thread and expert: the first place
} Buffers;

static float *take(float **next, int64_t count) {
  float *here = *next;
  *next += (count + 15) / 16 * 16;
  return here;
}

// Lays out the buffers from `base` on; returns the number of floats.
static int64_t lay_out(const Model *m, int64_t rows, int threads, float *base, Buffers *b) {
  float *next = base;
  int64_t slots = rows * m->router.top_k, inner = padded(m->inner), expert_inner = padded(m->expert_inner);
  int64_t hidden = padded(m->hidden), head = m->latent + m->rope, mixed = padded(m->latent);
  int64_t widest = rows * inner + slots * expert_inner;
  b->x = take(&next, rows * hidden);
  b->normed = take(&next, rows * hidden);
  b->query_low = take(&next, rows * padded(m->q_rank));
  b->query = take(&next, rows * padded((int64_t)m->heads * (m->nope + m->rope)));
  b->low = take(&next, rows * padded(head));
  b->absorbed = take(&next, rows * m->heads * padded(head));
  b->mixed = take(&next, rows * m->heads * mixed);
  b->values = take(&next, rows * padded((int64_t)m->heads * m->value));
  b->head_values = take(&next, threads * rows * padded(m->value));
  b->lanes = take(&next, (int64_t)threads * TOGETHER * m->latent * GROUP);
  b->out = take(&next, rows * hidden);
  b->inner = take(&next, widest);
  b->up = take(&next, widest);
  b->outputs = take(&next, slots * hidden);
  b->scores = take(&next, rows * padded(m->router.experts));
  b->choice = take(&next, threads * padded(m->router.experts));
  b->weights = take(&next, slots);
  b->placed_weights = take(&next, slots);
  b->ids = (int32_t *)take(&next, slots);
  b->places = (int32_t *)take(&next, slots);
  b->rows = (int32_t *)take(&next, slots);
  b->first = (int32_t *)take(&next, threads * (m->router.experts + 1));
  return next - base;
}

int64_t cached_step_floats(const Model *m, int64_t rows, int threads) {
  Buffers b;
  return lay_out(m, rows, threads, NULL, &b);
}

typedef struct {
  Team *team;
  const Model *m;
  const Batch *batch;
  Buffers b;
  int thread, threads, rows;
  Share mine;  // of the rows
} Thread;

INLINE Rows all(float *base, int64_t stride) { return (Rows){base, stride, NULL}; }

static void embed(Thread *t) {
  const Model *m = t->m;
  for (int r = t->mine.first; r < t->mine.last; r++) {
    float *x = t->b.x + r * padded(m->hidden);
    int64_t from = (int64_t)t->batch->ids[r] * m->hidden;
    for (int i = 0; i < padded(m->hidden); i++) x[i] = 0;
    if (m->embedding_format == F32) memcpy(x, (const float *)m->embedding + from, sizeof(float) * m->hidden);
    else for (int i = 0; i < m->hidden; i++) {
      uint32_t bits = (uint32_t)((const uint16_t *)m->embedding)[from + i] << 16;
      memcpy(x + i, &bits, sizeof bits);
    }
  }
}

static void norm_rows(Thread *t, const float *weight) {
  int64_t hidden = padded(t->m->hidden);
  for (int r = t->mine.first; r < t->mine.last; r++)
    norm(t->b.normed + r * hidden, t->b.x + r * hidden, weight, t->m->hidden, t->m->eps);
  barrier(t->team);
}

static Latents latents_of(const Thread *t, float *cache, int r) {
  const Batch *batch = t->batch;
  return (Latents){cache, batch->tables + batch->table[r], batch->slots, t->m->latent, t->m->latent + t->m->rope};
}

// Queries' latents are normed; keys' latents are normed, rotated, and written to the cache.
static void write_latents(Thread *t, const Layer *layer, float *cache) {
  const Model *m = t->m;
  const Batch *batch = t->batch;
  int width = m->latent + m->rope;
  for (int r = t->mine.first; r < t->mine.last; r++) {
    if (m->q_rank) {
      float *low = t->b.query_low + r * padded(m->q_rank);
      norm(low, low, layer->q_norm, m->q_rank, m->latent_eps);
    }
    float *low = t->b.low + r * padded(width), rope[m->rope];
    memcpy(rope, low + m->latent, sizeof rope);
    memset(low + m->latent, 0, sizeof rope);  // the norm is over the latent only
    norm(low, low, layer->kv_norm, m->latent, m->latent_eps);
    rotate(low + m->latent, rope, m->rotary + (int64_t)batch->positions[r] * m->rope, m->rope / 2);
    Latents latents = latents_of(t, cache, r);
    write_latent(&latents, batch->positions[r], low);
  }
}

// Query heads of this thread, multiplied with the key's half of kv_b: scores are then products with latents.
static void absorb_queries(Thread *t, const Layer *layer, Share heads) {
  const Model *m = t->m;
  int head = m->nope + m->rope;
  int64_t query = padded((int64_t)m->heads * head), each = padded(m->latent + m->rope);
  for (int h = heads.first; h < heads.last; h++) {
    Rows to = all(t->b.absorbed + h * each, m->heads * each), from = all(t->b.query + h * head, query);
    for (int p = 0; p < panels(&layer->key); p++) panel_product(&layer->key, h, p, to, from, t->rows);
    for (int r = 0; r < t->rows; r++) {
      const float *turn = m->rotary + (int64_t)t->batch->positions[r] * m->rope;
      rotate(row(to, r) + m->latent, row(from, r) + m->nope, turn, m->rope / 2);
    }
  }
}

static void attend_rows(Thread *t, float *cache, Share heads) {
  const Model *m = t->m;
  int64_t each = padded(m->latent + m->rope), mixed = padded(m->latent);
  float *lanes = t->b.lanes + (int64_t)t->thread * TOGETHER * m->latent * GROUP;
  for (int r = 0; r < t->rows; r++)
    for (int h = heads.first; h < heads.last; h += TOGETHER) {
      Latents latents = latents_of(t, cache, r);
      int count = heads.last - h < TOGETHER ? heads.last - h : TOGETHER;
      int64_t first = r * (int64_t)m->heads + h;
      attend(&latents, t->batch->positions[r], m->score_scale, count, t->b.absorbed + first * each, each,
             t->b.mixed + first * mixed, mixed, lanes);
    }
}

// Mixed latents of this thread's heads, multiplied with the value's half of kv_b.
static void expand_values(Thread *t, const Layer *layer, Share heads) {
  const Model *m = t->m;
  int64_t values = padded((int64_t)m->heads * m->value), mixed = padded(m->latent);
  Rows made = all(t->b.head_values + t->thread * t->rows * padded(m->value), padded(m->value));
  for (int h = heads.first; h < heads.last; h++) {
    for (int p = 0; p < panels(&layer->value); p++)
      panel_product(&layer->value, h, p, made, all(t->b.mixed + h * mixed, m->heads * mixed), t->rows);
    for (int r = 0; r < t->rows; r++)
      memcpy(t->b.values + r * values + h * m->value, row(made, r), sizeof(float) * m->value);
  }
}

static void attention(Thread *t, const Layer *layer, float *cache) {
  const Model *m = t->m;
  Buffers b = t->b;
  int rows = t->rows;
  Rows normed = all(b.normed, padded(m->hidden)), low = all(b.query_low, padded(m->q_rank));
  Rows queries = all(b.query, padded((int64_t)m->heads * (m->nope + m->rope)));
  product(m->q_rank ? &layer->q_a : &layer->q_b, m->q_rank ? low : queries, normed, rows, t->thread, t->threads);
  product(&layer->kv_a, all(b.low, padded(m->latent + m->rope)), normed, rows, t->thread, t->threads);
  barrier(t->team);  // products share outputs among threads; the next two share rows
  write_latents(t, layer, cache);
  barrier(t->team);  // rows attend to latents that others wrote
  if (m->q_rank) {
    product(&layer->q_b, queries, low, rows, t->thread, t->threads);
    barrier(t->team);
  }
  Share heads = share(m->heads, t->thread, t->threads);  // of this thread, up to its part of `values`
  absorb_queries(t, layer, heads);
  attend_rows(t, cache, heads);
  expand_values(t, layer, heads);
  barrier(t->team);
  product(&layer->o, all(b.out, padded(m->hidden)), all(b.values, padded((int64_t)m->heads * m->value)), rows, t->thread, t->threads);
  barrier(t->team);
}

// inner = silu(gate x) * up x * weight, this thread's panels of it.
static void gate_up(Thread *t, const Matrix *gate, const Matrix *up, int number, float *inner, float *up_rows, Rows x,
                    const float *row_weights, int rows) {
  int64_t stride = padded(gate->outputs);
  Share mine = share(panels(gate), t->thread, t->threads);
  for (int p = mine.first; p < mine.last; p++) panel_product(gate, number, p, all(inner, stride), x, rows);
  for (int p = mine.first; p < mine.last; p++) panel_product(up, number, p, all(up_rows, stride), x, rows);
  for (int p = mine.first; p < mine.last; p++)
    for (int r = 0; r < rows; r++)
      gated(inner + r * stride + p * PANEL, up_rows + r * stride + p * PANEL, row_weights ? row_weights[r] : 1.0f);
}

// Sorts the slots by expert: each slot's place, each place's row and weight. All threads compute the same places.
static void sort_slots(Thread *t, int32_t *first, int layer) {
  const Model *m = t->m;
  Buffers b = t->b;
  int slots = t->rows * m->router.top_k;
  memset(first, 0, sizeof(int32_t) * (m->router.experts + 1));
  for (int s = 0; s < slots; s++) first[b.ids[s] + 1]++;
  if (t->thread == 0) for (int e = 0; e < m->router.experts; e++) t->batch->load[(int64_t)layer * m->router.experts + e] += first[e + 1];
  for (int e = 0; e < m->router.experts; e++) first[e + 1] += first[e];
  int32_t next[m->router.experts];
  memcpy(next, first, sizeof next);
  for (int s = 0; s < slots; s++) {
    int place = next[b.ids[s]]++;
    if (t->thread) continue;
    b.places[s] = place, b.rows[place] = s / m->router.top_k, b.placed_weights[place] = b.weights[s];
  }
  barrier(t->team);
}

// Routes this thread's rows, then computes its panels of all experts' outputs, in the order of `places`.
static void routed_experts(Thread *t, const Layer *layer, int number) {
  const Model *m = t->m;
  Buffers b = t->b;
  int k = m->router.top_k;
  int64_t hidden = padded(m->hidden), inner = padded(m->inner), expert = padded(m->expert_inner), scores = padded(m->router.experts);
  float *expert_inner = b.inner + t->rows * inner, *expert_up = b.up + t->rows * inner;
  for (int r = t->mine.first; r < t->mine.last; r++)
    route(&m->router, layer->bias, b.scores + r * scores, b.choice + t->thread * scores, b.ids + r * k, b.weights + r * k);
  barrier(t->team);  // the sort reads the routes of all rows
  int32_t *first = b.first + t->thread * (m->router.experts + 1);
  sort_slots(t, first, number);
  for (int e = 0; e < m->router.experts; e++) {
    Rows from = {b.normed, hidden, b.rows + first[e]};
    int64_t at = first[e] * expert;
    gate_up(t, &layer->e_gate, &layer->e_up, e, expert_inner + at, expert_up + at, from, b.placed_weights + first[e], first[e + 1] - first[e]);
  }
  barrier(t->team);  // an output needs all of its row's inner values
  Share mine = share(panels(&layer->e_down), t->thread, t->threads);
  for (int e = 0; e < m->router.experts; e++)
    for (int p = mine.first; p < mine.last; p++)
      panel_product(&layer->e_down, e, p, all(b.outputs + first[e] * hidden, hidden), all(expert_inner + first[e] * expert, expert), first[e + 1] - first[e]);
}

static void feed_forward(Thread *t, const Layer *layer, int number) {
  const Model *m = t->m;
  Buffers b = t->b;
  int rows = t->rows, k = m->router.top_k;
  int64_t hidden = padded(m->hidden);
  Rows normed = all(b.normed, hidden);
  if (layer->gate.outputs) gate_up(t, &layer->gate, &layer->up, 0, b.inner, b.up, normed, NULL, rows);
  if (layer->moe) product(&layer->router, all(b.scores, padded(m->router.experts)), normed, rows, t->thread, t->threads);
  barrier(t->team);
  if (layer->moe) routed_experts(t, layer, number);
  if (layer->gate.outputs) product(&layer->down, all(b.out, hidden), all(b.inner, padded(layer->gate.outputs)), rows, t->thread, t->threads);
  barrier(t->team);
  for (int r = t->mine.first; r < t->mine.last; r++) {
    if (layer->gate.outputs) add(b.x + r * hidden, b.out + r * hidden, m->hidden);
    for (int s = r * k; layer->moe && s < (r + 1) * k; s++) add(b.x + r * hidden, b.outputs + b.places[s] * hidden, m->hidden);
  }
}

// The id of the largest logit, the first among equal ones, or -1 if one of them is not finite.
static int32_t best_of(const float *logits, int count) {
  int32_t best = 0;
  vec zeros = {0};
  int i = 0;
  for (; i + LANES <= count; i += LANES) zeros += *(const loose *)(logits + i) * 0;  // NaN unless all are finite
  float sum = total(zeros);
  vec top = (vec){0} - INFINITY;
  for (int j = 0; j + LANES <= count; j += LANES) top = larger(*(const loose *)(logits + j), top);
  float highest = -INFINITY;
  for (int j = 0; j < LANES; j++) highest = top[j] > highest ? top[j] : highest;
  for (; i < count; i++) sum += logits[i] * 0, highest = logits[i] > highest ? logits[i] : highest;
  if (sum != 0) return -1;
  while (logits[best] != highest) best++;
  return best;
}

typedef struct {
  const Model *model;
  const Batch *batch;
  float *scratch;
} Job;

static void run(Team *team, int thread, const void *argument) {
  const Job *job = argument;
  const Model *m = job->model;
  const Batch *batch = job->batch;
  Thread t = {team, m, batch, {0}, thread, team->threads, batch->rows, share(batch->rows, thread, team->threads)};
  lay_out(m, batch->rows, team->threads, job->scratch, &t.b);
  int64_t hidden = padded(m->hidden), vocab = padded(m->vocab);
  embed(&t);
  for (int l = 0; l < m->layers; l++) {
    norm_rows(&t, m->layer[l].attention_norm);
    attention(&t, &m->layer[l], batch->cache + l * batch->layer_stride);
    for (int r = t.mine.first; r < t.mine.last; r++) add(t.b.x + r * hidden, t.b.out + r * hidden, m->hidden);
    norm_rows(&t, m->layer[l].mlp_norm);
    feed_forward(&t, &m->layer[l], l);
  }
  barrier(team);
  Share wanted = share(batch->wanted_rows, thread, team->threads);
  for (int w = wanted.first; w < wanted.last; w++)
    norm(batch->hidden + w * hidden, t.b.x + batch->wanted[w] * hidden, m->final_norm, m->hidden, m->eps);
  barrier(team);
  product(&m->head, all(batch->logits, vocab), all(batch->hidden, hidden), batch->wanted_rows, thread, team->threads);
  barrier(team);
  for (int w = wanted.first; w < wanted.last; w++) batch->best[w] = best_of(batch->logits + w * vocab, batch->tokens);
}

Team *cached_step_start(int threads) { return start_team(threads); }

void cached_step_end(Team *team) { end_team(team); }

// Runs a step on all threads. scratch: `cached_step_floats` floats.
void cached_step(Team *team, const Model *model, const Batch *batch, float *scratch) {
  Job job = {model, batch, scratch};
  run_together(team, run, &job);
}
