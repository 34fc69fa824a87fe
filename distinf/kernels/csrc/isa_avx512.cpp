// Every kernel for one instruction set. The pragma comes after the standard headers, so that no shared inline
// function is compiled for a CPU that may not be there.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "activations.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")

namespace distinf::avx512 {
namespace {
#include "vec_avx512.h"
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
}  // namespace distinf::avx512

namespace distinf {
const KernelTable kAvx512Kernels = {
    avx512::linear_bf16, avx512::linear_quantised, avx512::linear_scratch_bytes,
    avx512::rms_norm,    avx512::layer_norm,       avx512::sum_parts,
    avx512::head_norm,   avx512::add_rows,         avx512::rope,
    avx512::kv_append,   avx512::attention,        avx512::softcap,
    avx512::expert_sum,  avx512::embedding,        avx512::read_stream,
    avx512::peak_bf16,   avx512::peak_int8,
};
}  // namespace distinf
