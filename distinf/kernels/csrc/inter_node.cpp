#include "inter_node.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace distinf {
namespace {

// A message-passing library that fails in the middle of a step leaves ranks out of step with each other: the whole job
// has to end, and the launcher ends it when one rank does.
void check(int status, const char* call) {
  if (status == 0) return;
  std::fprintf(stderr, "distinf: %s failed with status %d\n", call, status);
  std::abort();
}

}  // namespace

InterNode mpi_inter_node(const MpiCalls& calls, const KernelTable& kernels) {
  using AllReduceCall = int (*)(const void*, void*, int, uintptr_t, uintptr_t, uintptr_t);
  using AllGatherCall = int (*)(const void*, int, uintptr_t, void*, int, uintptr_t, uintptr_t);
  const auto all_reduce = reinterpret_cast<AllReduceCall>(calls.all_reduce);
  const auto all_gather = reinterpret_cast<AllGatherCall>(calls.all_gather);
  const auto gathered = std::make_shared<std::vector<bf16>>();
  return [=, &kernels](void* data, int64_t n, bool is_bf16) {
    if (!is_bf16) {
      const auto* in_place = reinterpret_cast<const void*>(calls.in_place);
      check(all_reduce(in_place, data, static_cast<int>(n), calls.fp32, calls.sum, calls.comm), "MPI_Allreduce");
      return;
    }
    gathered->resize(n * calls.nodes);
    const int bytes = static_cast<int>(n * sizeof(bf16));
    check(all_gather(data, bytes, calls.byte, gathered->data(), bytes, calls.byte, calls.comm), "MPI_Allgather");
    std::vector<const void*> parts(calls.nodes);
    for (int node = 0; node < calls.nodes; node++) parts[node] = gathered->data() + node * n;
    kernels.sum_parts({parts.data(), calls.nodes, true}, 0, n, data, true);
  };
}

InterNode call_inter_node(const ReduceCalls& calls) {
  using Call = int (*)(void*, void*, int64_t);
  return [=](void* data, int64_t n, bool is_bf16) {
    const auto call = reinterpret_cast<Call>(is_bf16 ? calls.bf16 : calls.fp32);
    check(call(reinterpret_cast<void*>(calls.context), data, n), "the all-reduce between nodes");
  };
}

}  // namespace distinf
