// Weights into the order the kernels read them.
#pragma once
#include <cstdint>

#include "weight.h"

namespace distinf {

// Some rows (output columns) of a weight. The first is a multiple of kPanel, and so is their number unless they are
// the last: calls for different rows may run at the same time.
struct RowRange {
  int64_t first, count;
};

// Packs src[rows.count, k] (fp32 or bf16, row stride `stride`) into weight.data, quantising as its format says. Of a
// gated weight they are rows of the gate, or with `up` of its other half: these come after the gate's.
template <class T>
void pack(const T* src, int64_t stride, RowRange rows, bool up, const Weight& weight);

// Packs numbers[rows.count, k] that are quantised already, and their scales and offsets [rows.count, groups] in
// weight.scales (offsets: null where the format has none).
void pack_integers(const uint8_t* numbers, int64_t stride, const char* scales, const char* offsets, RowRange rows,
                   bool up, const Weight& weight);

}  // namespace distinf
