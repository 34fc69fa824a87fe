// Weights into the order the kernels read them, and the bandwidth probe that reads memory in the same way.
#pragma once
#include "kernel_table.h"

namespace distinf {

// Packs src[n, k] (fp32 or bf16, row stride `stride`) into weight.data, quantising as its format says.
template <class T>
void pack(const Worker& w, const T* src, int64_t stride, const Weight& weight);

// Reads bytes (a multiple of 64 per worker), one contiguous run per worker with software prefetch; returns
// something that depends on all of it, so that no load can be dropped.
uint64_t read_stream(const Worker& w, const void* data, int64_t bytes);

}  // namespace distinf
