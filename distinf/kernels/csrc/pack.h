// Weights into the order the kernels read them, and the bandwidth probe that reads memory in the same way.
#pragma once
#include "kernel_table.h"

namespace distinf {

// dst[panel][pair][column][2] = src[n, k] (fp32 or bf16), zero where n or k is padding. Memory: packed_elements.
template <class T>
void pack_bf16(const Worker& w, const T* src, int64_t stride, bf16* dst, int64_t n, int64_t k);

constexpr int64_t packed_elements(int64_t n, int64_t k) { return round_up(n, kPanel) * round_up(k, kDepth); }

// Reads bytes (a multiple of 64 per worker), one contiguous run per worker with software prefetch; returns
// something that depends on all of it, so that no load can be dropped.
uint64_t read_stream(const Worker& w, const void* data, int64_t bytes);

}  // namespace distinf
