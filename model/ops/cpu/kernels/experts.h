// Mixture-of-experts MLPs: each token's experts, weighted and added.
#pragma once

#include "gemm/linear.h"
#include "scratch.h"

namespace {

// Pairs (token, rank of the expert) in order of their expert.
struct PairsByExpert {
  std::vector<int64_t> offsets;  // [experts + 1]: where each expert's pairs begin
  std::vector<int64_t> pairs;    // token · top_k + rank
};

const PairsByExpert& sort_by_expert(const int64_t* expert_ids, int64_t pairs, int64_t experts) {
  static thread_local PairsByExpert sorted;
  sorted.offsets.assign((size_t)experts + 1, 0);
  sorted.pairs.resize((size_t)pairs);
  for (int64_t i = 0; i < pairs; i++) sorted.offsets[(size_t)expert_ids[i] + 1]++;
  for (int64_t e = 0; e < experts; e++) sorted.offsets[(size_t)e + 1] += sorted.offsets[(size_t)e];
  static thread_local std::vector<int64_t> next;
  next = sorted.offsets;
  for (int64_t i = 0; i < pairs; i++) sorted.pairs[(size_t)next[(size_t)expert_ids[i]]++] = i;
  return sorted;
}

// What one thread computes at a time: a panel of gates and one of values of one expert, for the
// pairs [first, last).
struct ExpertItem {
  int64_t expert, panel, first, last;
};

const std::vector<ExpertItem>& expert_items(const PairsByExpert& sorted, int64_t experts,
                                            int64_t panels, int64_t span) {
  static thread_local std::vector<ExpertItem> items;
  items.clear();
  for (int64_t e = 0; e < experts; e++) {
    const int64_t end = sorted.offsets[(size_t)e + 1];
    for (int64_t first = sorted.offsets[(size_t)e]; first < end; first += span)
      for (int64_t panel = 0; panel < panels; panel++)
        items.push_back({e, panel, first, std::min(end, first + span)});
  }
  return items;
}

// One expert's rows of x in the order of its pairs, in the number format that is multiplied.
void gather_rows(const Weight& weight, const bf16* x, const int64_t* pairs, int64_t top_k,
                 const Rows& to) {
  for (int64_t r = 0; r < to.count; r++)
    take_row(weight, x + pairs[r] / top_k * weight.inputs, to, r);
}

// x [tokens, inputs] → out [tokens, outputs]: the experts expert_ids [tokens, top_k] of each token,
// times their weights. They are added in the experts' order, so that a sum does not depend on the
// other tokens. gate_up, down: one weight for each expert.
void experts(const Weight* gate_up, const Weight* down, int64_t num_experts,
             const bf16* x, int64_t tokens, const int64_t* expert_ids, const float* weights,
             int64_t top_k, int64_t kind, float limit, float alpha, bf16* out, int threads) {
  const Activation activation{kind, limit, alpha};
  const int64_t pairs = tokens * top_k, inputs = gate_up->inputs, size = gate_up->outputs / 2;
  const PairsByExpert& sorted = sort_by_expert(expert_ids, pairs, num_experts);
  const auto& items =
      expert_items(sorted, num_experts, size / PANEL, rows_at_once(*gate_up, pairs));
  const int64_t total = (int64_t)items.size();
  const int64_t chunk = std::max<int64_t>(1, total / (16 * threads));
  const Rows gathered = allocate_rows(*gate_up, 0, pairs);
  const Rows inner_rows = allocate_rows(*down, 1, pairs);
  // Gated values: where they will be multiplied, or as bf16 that become integers later.
  bf16* inner =
      takes_integers(*down) ? shared_scratch<bf16>(2, pairs * size) : (bf16*)inner_rows.data;
  // Panels of `down` that share a pass over the rows: with their sums they fit a core's cache.
  const int64_t outputs = down->outputs, panels = (outputs + PANEL - 1) / PANEL;
  const int64_t panels_at_once = std::clamp<int64_t>(panels / (2 * threads), 1, 8);
  const int64_t span = std::max(rows_at_once(*gate_up, pairs), rows_at_once(*down, pairs));
  const int64_t sums_offset =
      std::max(scratch_size(*gate_up, span, 2), scratch_size(*down, span, 1));
  const int64_t* offsets = sorted.offsets.data();
  const int64_t* sorted_pairs = sorted.pairs.data();
  const ExpertItem* item_list = items.data();
  divide(pairs * inputs < 1 << 15 ? 1 : threads, num_experts, 1, [=](int64_t e, int64_t last) {
    for (; e < last; e++)
      gather_rows(*gate_up, x, sorted_pairs + offsets[e], top_k,
                  slice_rows(*gate_up, gathered, offsets[e], offsets[e + 1] - offsets[e]));
  });
  divide(threads, total, chunk, [=](int64_t first_item, int64_t last_item) {
    float* scratch = thread_scratch<float>(sums_offset);
    Carried carried;
    for (int64_t i = first_item; i < last_item; i++) {
      const ExpertItem item = item_list[i];
      const Rows rows = slice_rows(*gate_up, gathered, item.first, item.last - item.first);
      bf16* out_rows = inner + item.first * size;
      gated_block(gate_up[item.expert], item.panel, item.panel + 1, rows, activation, scratch,
                  carried, [&](int64_t r) {
                    return out_rows + (rows.arranged ? arranged_offset(r, rows.count, size,
                                                                       item.panel * PANEL)
                                                     : r * size + item.panel * PANEL);
                  });
    }
    release_tiles(carried.tiles);
  });
  prepare_rows(*down, inner, inner_rows, threads);
  const int64_t parts = (panels + panels_at_once - 1) / panels_at_once;
  divide(threads, parts, 1, [=](int64_t part, int64_t last_part) {
    float* scratch = thread_scratch<float>(sums_offset + panels_at_once * tokens * PANEL);
    float* sums = scratch + sums_offset;
    Carried carried;
    for (; part < last_part; part++) {
      const int64_t begin = part * panels_at_once, end = std::min(panels, begin + panels_at_once);
      memset(sums, 0, (size_t)((end - begin) * tokens * PANEL) * 4);
      for (int64_t e = 0; e < num_experts; e++) {
        const int64_t last = offsets[e + 1];
        for (int64_t first = offsets[e]; first < last; first += span) {
          const Rows rows = slice_rows(*down, inner_rows, first, std::min(span, last - first));
          for (int64_t panel = begin; panel < end; panel++) {
            float* panel_sums = sums + (panel - begin) * tokens * PANEL;
            rows_times_panels<1>(down[e], {panel}, rows, scratch, carried, panel + 1,
                                 [&](int64_t r, const vec_f32(&products)[1][VECTORS]) {
                                   const int64_t pair = sorted_pairs[first + r];
                                   float* to = panel_sums + pair / top_k * PANEL;
                                   for (int v = 0; v < VECTORS; v++, to += LANES)
                                     store(to, load(to) + products[0][v] * weights[pair]);
                                 });
          }
        }
      }
      for (int64_t panel = begin; panel < end; panel++)
        for (int64_t token = 0; token < tokens; token++) {
          const float* from = sums + ((panel - begin) * tokens + token) * PANEL;
          vec_f32 row[VECTORS];
          for (int v = 0; v < VECTORS; v++) row[v] = load(from + v * LANES);
          write_row(row, out + token * outputs + panel * PANEL, outputs - panel * PANEL);
        }
    }
    release_tiles(carried.tiles);
  });
}

}  // namespace
