// AMX for GEMMs of several rows and for attention; everything else is the AVX-512 bf16 path.
#include <algorithm>

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
bool expands(const Weight& w, int64_t rows) { return w.digits == 2 && w.group && 2 * rows >= w.group; }

void linear_quantised(const Worker& w, const LinearArgs& args) {
  if (args.m < kAmxRows) return kAvx512Bf16Kernels.linear_quantised(w, args);
  (expands(args.w, args.m) ? linear_bf16_amx : linear_quantised_amx)(w, args);
}

int64_t linear_scratch_bytes(const Weight& w, int64_t rows, int workers) {
  const int64_t vectors = kAvx512Bf16Kernels.linear_scratch_bytes(w, rows, workers);
  if (rows < kAmxRows || (w.bits < 16 && !expands(w, rows))) return vectors;
  return std::max(vectors, amx_scratch_bytes(w, rows, workers));
}

KernelTable with_amx() {
  KernelTable table = kAvx512Bf16Kernels;
  table.linear_bf16 = linear_bf16;
  table.linear_quantised = linear_quantised;
  table.linear_scratch_bytes = linear_scratch_bytes;
  table.attention = attention_amx;
  table.peak_bf16 = peak_bf16_amx;
  table.peak_int8 = peak_int8_amx;
  return table;
}

}  // namespace

const KernelTable kAmxKernels = with_amx();

}  // namespace distinf
