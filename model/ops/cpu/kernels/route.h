// The router: each token's experts and their weights from its logits.
#pragma once

#include "scratch.h"
#include "token_ops.h"

namespace {

// RouterSpec of specs.py; without groups, their count is 1.
struct Routing {
  int64_t top_k;
  bool softmax_after_top_k, normalize, sigmoid;
  int64_t groups, chosen_groups, group_best;
  float scale;
};

INLINE int64_t take_highest(float* values, int64_t count) {
  const int64_t best = std::max_element(values, values + count) - values;
  values[best] = -INFINITY;
  return best;
}

// Experts in the order of their logits.
void route_by_logits(const float* logits, int64_t experts, const Routing& by, float* values,
                     int64_t* expert_ids, float* weights) {
  float max = -INFINITY, sum = 0;
  for (int64_t e = 0; e < experts; e++) {
    values[e] = logits[e];
    max = std::max(max, values[e]);
  }
  if (!by.softmax_after_top_k)
    for (int64_t e = 0; e < experts; e++) sum += std::exp(values[e] - max);
  float top_k_sum = 0;
  for (int64_t k = 0; k < by.top_k; k++) {
    const int64_t best = std::max_element(values, values + experts) - values;
    expert_ids[k] = best;
    weights[k] = std::exp(values[best] - max);
    top_k_sum += weights[k];
    values[best] = -INFINITY;
  }
  const float divisor = by.softmax_after_top_k || by.normalize ? top_k_sum : sum;
  for (int64_t k = 0; k < by.top_k; k++) weights[k] /= divisor;
}

// Sets the ranks of experts that are not in the best groups to -infinity.
// scratch: [experts + groups]
void keep_best_groups(float* ranks, int64_t experts, const Routing& by, float* scratch) {
  const int64_t size = experts / by.groups;
  float* totals = scratch + experts;
  std::copy(ranks, ranks + experts, scratch);
  for (int64_t g = 0; g < by.groups; g++) {
    totals[g] = 0;
    for (int64_t i = 0; i < by.group_best; i++) {
      float* best = std::max_element(scratch + g * size, scratch + (g + 1) * size);
      totals[g] += *best;
      *best = -INFINITY;
    }
  }
  for (int64_t i = 0; i < by.chosen_groups; i++) take_highest(totals, by.groups);
  for (int64_t e = 0; e < experts; e++)
    if (totals[e / size] != -INFINITY) ranks[e] = -INFINITY;
}

// Experts in the order of their scores plus `correction` [experts], if it is not null, of the best
// groups. scores: [3 · experts + groups]
void route_by_scores(const float* logits, const float* correction, int64_t experts,
                     const Routing& by, float* scores, int64_t* expert_ids, float* weights) {
  float *ranks = scores + experts, *scratch = ranks + experts, max = -INFINITY, sum = 0;
  for (int64_t e = 0; e < experts; e++) max = std::max(max, logits[e]);
  for (int64_t e = 0; e < experts; e++) {
    const float logit = logits[e];
    scores[e] = by.sigmoid ? 1.0f / (1.0f + std::exp(-logit)) : std::exp(logit - max);
    sum += scores[e];
  }
  for (int64_t e = 0; e < experts; e++) {
    if (!by.sigmoid) scores[e] /= sum;
    ranks[e] = scores[e] + (correction ? correction[e] : 0.0f);
  }
  if (by.groups > 1) keep_best_groups(ranks, experts, by, scratch);
  float top_k_sum = 1e-20f;
  for (int64_t k = 0; k < by.top_k; k++) {
    expert_ids[k] = take_highest(ranks, experts);
    weights[k] = scores[expert_ids[k]];
    top_k_sum += weights[k];
  }
  if (by.normalize)
    for (int64_t k = 0; k < by.top_k; k++) weights[k] /= top_k_sum;
}

// logits [rows, experts] → expert_ids and weights [rows, top_k]. scales_experts: `correction` is not
// added to the scores, but multiplies the weights.
void route(const float* logits, const float* correction, int64_t rows, int64_t experts,
           int64_t top_k, bool softmax_after_top_k, bool normalize, bool sigmoid, int64_t groups,
           int64_t chosen_groups, int64_t group_best, float scale, bool scales_experts,
           int64_t* expert_ids, float* weights, int threads) {
  const Routing by{top_k,  softmax_after_top_k, normalize,  sigmoid,
                   groups, chosen_groups,       group_best, scale};
  const float* added = scales_experts ? nullptr : correction;
  if (rows * experts < 1 << 11) threads = 1;
  divide(threads, rows, rows_per_piece(rows, threads), [=](int64_t first, int64_t last) {
    float* values = thread_scratch<float>(3 * experts + groups);
    for (int64_t row = first; row < last; row++) {
      const float* from = logits + row * experts;
      int64_t* ids = expert_ids + row * top_k;
      float* to = weights + row * top_k;
      if (sigmoid || added || groups > 1)
        route_by_scores(from, added, experts, by, values, ids, to);
      else
        route_by_logits(from, experts, by, values, ids, to);
      if (scale != 1)
        for (int64_t k = 0; k < top_k; k++) to[k] *= scale;
      if (scales_experts)
        for (int64_t k = 0; k < top_k; k++) to[k] *= correction[ids[k]];
    }
  });
}

}  // namespace
