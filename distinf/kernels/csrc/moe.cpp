#include "moe.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace distinf {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void softmax(const float* logits, int64_t n, float* out) {
  const float peak = *std::max_element(logits, logits + n);
  float total = 0;
  for (int64_t i = 0; i < n; i++) total += out[i] = std::exp(logits[i] - peak);
  for (int64_t i = 0; i < n; i++) out[i] /= total;
}

void sigmoid(const float* logits, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = 1 / (1 + std::exp(-logits[i]));
}

// The k largest of n values: use(place), the first of equal ones first. They become kNever.
template <class Use>
void take_largest(float* values, int64_t n, int64_t k, Use use) {
  for (int64_t i = 0; i < k; i++) {
    float* best = std::max_element(values, values + n);
    use(best - values);
    *best = kNever;
  }
}

// Experts outside the best groups become kNever.
void keep_best_groups(const RouteArgs& args, float* choice) {
  const int64_t size = args.experts / args.groups;
  float quality[kMaxExperts] = {}, members[kMaxExperts];
  for (int64_t group = 0; group < args.groups; group++) {
    std::copy_n(choice + group * size, size, members);
    take_largest(members, size, args.group_best, [&](int64_t i) { quality[group] += choice[group * size + i]; });
  }
  bool kept[kMaxExperts] = {};
  take_largest(quality, args.groups, args.top_groups, [&](int64_t group) { kept[group] = true; });
  for (int64_t i = 0; i < args.experts; i++) {
    if (!kept[i / size]) choice[i] = kNever;
  }
}

void route_row(const RouteArgs& args, int64_t row) {
  float scores[kMaxExperts], choice[kMaxExperts];
  (args.sigmoid ? sigmoid : softmax)(args.logits + row * args.experts, args.experts, scores);
  for (int64_t i = 0; i < args.experts; i++) choice[i] = scores[i] + (args.bias ? args.bias[i] : 0);
  if (args.groups > 1) keep_best_groups(args, choice);
  int32_t* ids = args.ids + row * args.top_k;
  float* weights = args.weights + row * args.top_k;
  float total = 0;
  int64_t chosen = 0;
  take_largest(choice, args.experts, args.top_k, [&](int64_t expert) {
    ids[chosen] = static_cast<int32_t>(expert);
    total += weights[chosen++] = scores[expert];
  });
  for (int64_t i = 0; i < args.top_k; i++) weights[i] *= args.scale / (args.normalise ? total : 1);
}

// A counting sort by expert.
void group_rows(const RouteArgs& args) {
  const int64_t n = args.rows * args.top_k;
  int32_t next[kMaxExperts];
  std::fill_n(args.starts, args.experts + 1, 0);
  for (int64_t i = 0; i < n; i++) args.starts[args.ids[i] + 1]++;
  for (int64_t e = 0; e < args.experts; e++) args.starts[e + 1] += args.starts[e];
  std::copy_n(args.starts, args.experts, next);
  for (int64_t i = 0; i < n; i++) args.place[i] = next[args.ids[i]]++;
}

}  // namespace

void route(const Worker& w, const RouteArgs& args) {
  for (int64_t row = w.begin(args.rows); row < w.end(args.rows); row++) route_row(args, row);
  w.barrier();
  if (w.index == 0) group_rows(args);
}

}  // namespace distinf
