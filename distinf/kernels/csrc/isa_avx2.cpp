// Every kernel for one instruction set. The pragma comes after the standard headers, so that no shared inline
// function is compiled for a CPU that may not be there.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "activations.h"

#pragma GCC target("avx2,fma,f16c")

namespace distinf::avx2 {
namespace {
#include "vec_avx2.h"
#include "elementwise.inl"
#include "act.inl"
#include "reduce.inl"
#include "norm.inl"
#include "nonlinear.inl"
#include "moe.inl"
#include "panel.inl"
#include "gemm_bf16.inl"
#include "activations.inl"
#include "gemm_quantised.inl"
#include "attention.inl"
#include "read_stream.inl"
#include "peak.inl"
}  // namespace
}  // namespace distinf::avx2

namespace distinf {
const KernelTable kAvx2Kernels = {
    avx2::linear_bf16, avx2::linear_quantised, avx2::linear_scratch_bytes,
    avx2::rms_norm,    avx2::layer_norm,       avx2::sum_parts,
    avx2::head_norm,   avx2::add_rows,         avx2::rope,
    avx2::kv_append,   avx2::attention,        avx2::softcap,
    avx2::expert_sum,  avx2::embedding,        avx2::read_stream,
    avx2::peak_bf16,   avx2::peak_int8,
};
}  // namespace distinf
