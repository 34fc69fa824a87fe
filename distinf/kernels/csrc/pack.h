// Weights into the order the kernels read them.
#pragma once
#include "kernel_table.h"

namespace distinf {

// Packs src[n, k] (fp32 or bf16, row stride `stride`) into weight.data, quantising as its format says.
template <class T>
void pack(const Worker& w, const T* src, int64_t stride, const Weight& weight);

}  // namespace distinf
