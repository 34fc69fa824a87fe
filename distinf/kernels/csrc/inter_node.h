// Sums over nodes by libraries that the extension is not linked to: Python finds them and hands over addresses.
#pragma once
#include <cstdint>

#include "all_reduce.h"

namespace distinf {

// Functions of the MPI library that mpi4py has loaded, and its handles as the two ABIs in use have them: int in
// MPICH's (Intel MPI's too), pointers in Open MPI's. Both travel in a register of 64 bits.
struct MpiCalls {
  uintptr_t all_reduce, all_gather, in_place;  // MPI_Allreduce, MPI_Allgather, MPI_IN_PLACE
  uintptr_t comm, fp32, byte, sum;             // a communicator of one rank a node, MPI_FLOAT, MPI_BYTE, MPI_SUM
  int nodes;
};

// fp32: MPI_Allreduce. bf16, which MPI has no type for: all nodes' numbers are gathered and added here in fp32, in the
// nodes' order, with one rounding. `kernels` does the adding.
InterNode mpi_inter_node(const MpiCalls& calls, const KernelTable& kernels);

// Any library with a function of this form for each type, which returns 0 or an error: oneCCL's.
struct ReduceCalls {
  uintptr_t fp32, bf16;  // int (*)(void* context, float* or uint16_t* data, int64_t n)
  uintptr_t context;
};
InterNode call_inter_node(const ReduceCalls& calls);

}  // namespace distinf
