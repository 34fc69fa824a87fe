// Mixture of experts: the choice of experts and the order of their rows. distinf/kernels/routing.py has the terms.
#pragma once
#include <cstdint>

#include "thread_team.h"

namespace distinf {

// Logits of a row are kept on the stack while it chooses.
constexpr int64_t kMaxExperts = 512;

struct RouteArgs {
  const float* logits;  // [rows, experts]
  const float* bias;    // [experts], added to scores for the choice alone; nullptr: none
  int64_t rows, experts, top_k;
  bool sigmoid, normalise;
  float scale;
  int64_t groups, top_groups, group_best;
  int32_t* ids;     // [rows, top_k]
  float* weights;   // [rows, top_k]
  int32_t* place;   // [rows, top_k]
  int32_t* starts;  // [experts + 1]
};

void route(const Worker& w, const RouteArgs& args);

}  // namespace distinf
