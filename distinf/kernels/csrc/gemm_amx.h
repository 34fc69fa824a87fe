#pragma once
#include "kernel_table.h"

namespace distinf {

// linear_bf16 of KernelTable on AMX tiles. The caller has checked isa_available(Isa::kAmx).
void linear_bf16_amx(const Worker& w, const LinearArgs& args);
// Scratch that it needs for at most so many rows.
int64_t amx_scratch_bytes(const Weight& w, int64_t rows, int workers);

// linear_quantised of KernelTable on AMX tiles.
void linear_quantised_amx(const Worker& w, const LinearArgs& args);

// peak_bf16 and peak_int8 of KernelTable on tiles.
double peak_bf16_amx(int64_t iterations, float* sink);
double peak_int8_amx(int64_t iterations, float* sink);

}  // namespace distinf
