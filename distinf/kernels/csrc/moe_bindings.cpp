// The operations of mixtures of experts, on raw addresses. distinf/kernels/native.py checks shapes and dtypes.
#include "moe_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "moe.h"

using namespace distinf;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void route_rows(Runtime& rt, uintptr_t logits, uintptr_t bias, int64_t rows, int64_t experts, int64_t top_k,
                bool sigmoid, bool normalise, float scale, int64_t groups, int64_t top_groups, int64_t group_best,
                uintptr_t ids, uintptr_t weights, uintptr_t place, uintptr_t starts) {
  if (experts > kMaxExperts) throw std::invalid_argument("route: more than 512 experts");
  const RouteArgs args{at<const float>(logits),
                       at<const float>(bias),
                       rows,
                       experts,
                       top_k,
                       sigmoid,
                       normalise,
                       scale,
                       groups,
                       top_groups,
                       group_best,
                       at<int32_t>(ids),
                       at<float>(weights),
                       at<int32_t>(place),
                       at<int32_t>(starts)};
  rt.execute([=](const Worker& w) { route(w, args); });
}

// out[place[i]] = x[i / top_k], rows of `bytes`, for places *first .. *end
void expert_rows(Runtime& rt, uintptr_t x, uintptr_t place, uintptr_t first, uintptr_t end, int64_t rows, int64_t top_k,
                 int64_t bytes, uintptr_t out) {
  rt.execute([=](const Worker& w) {
    for (int64_t i = w.begin(rows * top_k); i < w.end(rows * top_k); i++) {
      const int64_t to = at<const int32_t>(place)[i];
      if (to < *at<const int32_t>(first) || to >= *at<const int32_t>(end)) continue;
      std::memcpy(at<char>(out) + to * bytes, at<const char>(x) + i / top_k * bytes, bytes);
    }
  });
}

// Each expert's linear over its own rows, starts[e] .. starts[e + 1] of x; an expert without rows is not read.
void expert_linear(Runtime& rt, uintptr_t x, const std::vector<Weight>& experts, uintptr_t starts, Act act,
                   uintptr_t out, bool out_fp32, int64_t rows) {
  for (const Weight& weight : experts) {
    rt.reserve_scratch(rt.kernels.linear_scratch_bytes(weight, rows, rt.team.size()));
  }
  rt.execute([=, &rt](const Worker& w) {
    const auto* first = at<const int32_t>(starts);
    bool begun = false;
    for (size_t e = 0; e < experts.size(); e++) {
      if (first[e] == first[e + 1]) continue;
      if (begun) w.barrier();  // the scratch memory is the last expert's until all are done with it
      begun = true;
      const Weight& weight = experts[e];
      const auto kernel = weight.bits == 16 ? rt.kernels.linear_bf16 : rt.kernels.linear_quantised;
      const int64_t width = weight.columns() * (out_fp32 ? 4 : 2);
      kernel(w, {at<const bf16>(x) + first[e] * weight.k, weight.k, weight, nullptr, act,
                 at<char>(out) + first[e] * width, weight.columns(), out_fp32, first[e + 1] - first[e], rt.scratch()});
    }
  });
}

void expert_sum(Runtime& rt, uintptr_t y, uintptr_t weights, uintptr_t place, uintptr_t first, uintptr_t end,
                uintptr_t plus, uintptr_t gate, int64_t rows, int64_t top_k, int64_t n, uintptr_t out) {
  const ExpertSumArgs args{at<const float>(y),
                           at<const float>(weights),
                           at<const int32_t>(place),
                           at<const int32_t>(first),
                           at<const int32_t>(end),
                           at<const float>(plus),
                           at<const float>(gate),
                           rows,
                           top_k,
                           n,
                           at<float>(out)};
  rt.execute([=, &rt](const Worker& w) { rt.kernels.expert_sum(w, args); });
}

}  // namespace

void bind_moe(pybind11::class_<Runtime>& runtime) {
  runtime.def("route", &route_rows)
      .def("expert_rows", &expert_rows)
      .def("expert_linear", &expert_linear)
      .def("expert_sum", &expert_sum);
}
