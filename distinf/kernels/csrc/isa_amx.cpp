// AMX for GEMMs of several rows and for attention; everything else is the AVX-512 bf16 path.
#include "attention_amx.h"
#include "gemm_amx.h"

namespace distinf {
namespace {

// Below this many rows a tile is mostly empty and the vector kernel reads the weights just as fast.
constexpr int64_t kAmxRows = 4;

void linear_bf16(const Worker& w, const LinearArgs& args) {
  (args.m < kAmxRows ? kAvx512Bf16Kernels.linear_bf16 : linear_bf16_amx)(w, args);
}

// Tiles hold a group's whole-number sums, which each block of 16 rows has to turn into fp32 at the group's end. To make
// the panel bf16 instead is about 20 instructions for 64 numbers, once for all rows: by count, half a group's
// rows are enough for that.
bool expands(const LinearArgs& args) { return args.w.digits == 2 && args.w.group && 2 * args.m >= args.w.group; }

void linear_quantised(const Worker& w, const LinearArgs& args) {
  if (args.m < kAmxRows) return kAvx512Bf16Kernels.linear_quantised(w, args);
  (expands(args) ? linear_bf16_amx : linear_quantised_amx)(w, args);
}

KernelTable with_amx() {
  KernelTable table = kAvx512Bf16Kernels;
  table.linear_bf16 = linear_bf16;
  table.linear_quantised = linear_quantised;
  table.attention = attention_amx;
  table.peak_bf16 = peak_bf16_amx;
  table.peak_int8 = peak_int8_amx;
  return table;
}

}  // namespace

const KernelTable kAmxKernels = with_amx();

}  // namespace distinf
