// Every kernel for one instruction set. The pragma comes after the standard headers, so that no shared inline
// function is compiled for a CPU that may not be there.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "activations.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#define DISTINF_HAS_BF16

namespace distinf::avx512_bf16 {
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
}  // namespace distinf::avx512_bf16

namespace distinf {
const KernelTable kAvx512Bf16Kernels = {
    avx512_bf16::linear_bf16, avx512_bf16::linear_quantised, avx512_bf16::linear_scratch_bytes,
    avx512_bf16::rms_norm,    avx512_bf16::layer_norm,       avx512_bf16::sum_parts,
    avx512_bf16::head_norm,   avx512_bf16::add_rows,         avx512_bf16::rope,
    avx512_bf16::kv_append,   avx512_bf16::attention,        avx512_bf16::softcap,
    avx512_bf16::expert_sum,  avx512_bf16::embedding,        avx512_bf16::read_stream,
    avx512_bf16::peak_bf16,   avx512_bf16::peak_int8,
};
}  // namespace distinf
