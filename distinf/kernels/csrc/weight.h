// Packed weights: their formats and their one layout, which serves one row and two thousand.
//
// A weight is cut into panels of kPanel output columns. A panel is one contiguous run of memory, read front to
// back, so a thread's share of a weight is one run too.
//
//   bf16:       [k / 2][kPanel][2]                                   pairs, as the bf16 dot products take them
//   quantised:  groups of `group` rows of K, each
//               scales [kPanel], (offsets [kPanel],) bf16 or what a checkpoint's own need, then the numbers:
//                 8 bit [group / 4][kPanel][4] u8                    quads, as the int8 dot products take them
//                 4 bit [group / 4][kPanel / 2][4]: column c in the low nibble, column c + 16 in the high one
//
// A gated weight (`gated`) holds two of the same shape, the gate's rows before the others: a panel is kPanel / 2
// columns of the gate and then the same ones of the other, so that whoever has a panel's sums has both factors.
//
// A quantised weight is scale * (number - middle), the middle of the grid being 128 or 8, or with offsets
// scale * number + offset. Numbers are unsigned, because VNNI multiplies unsigned by signed and the activations
// are signed.
#pragma once
#include <cstdint>

#include "bf16.h"

namespace distinf {

// Columns of a panel: two AMX tiles, two AVX-512 or four AVX2 vectors wide.
constexpr int64_t kPanel = 32;
// bf16 rows of K are padded to one AMX tile (32), quantised ones to one (64); the padding multiplies zeros.
constexpr int64_t kDepth = 32;
constexpr int64_t kQuantisedDepth = 64;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Of scales and offsets: bf16 where this program quantised, else whatever holds the checkpoint's exactly.
enum class ScaleType { kBf16, kFp16, kFp32 };

struct Weight {
  char* data;
  int64_t n, k;
  int bits;       // of a number: 16 (bf16), 8 or 4
  int digits;     // int8 digits of a quantised activation: 1 (8 bit) or 2 (15 bit, for weight-only formats)
  int64_t group;  // rows of K that share a scale; 0: all of them
  bool offsets;   // one for each scale
  ScaleType scales;
  bool gated;

  // Of the result, and those of it that a panel has.
  int64_t columns() const { return gated ? n / 2 : n; }
  int64_t panel_columns() const { return gated ? kPanel / 2 : kPanel; }
  int64_t panels() const { return round_up(columns(), panel_columns()) / panel_columns(); }
  // Rows of K of a group as packed: a lone group is padded to whole tiles.
  int64_t group_rows() const { return group ? group : round_up(k, kQuantisedDepth); }
  int64_t groups() const { return (k + group_rows() - 1) / group_rows(); }
  int64_t scale_bytes() const { return scales == ScaleType::kFp32 ? 4 : 2; }
  int64_t group_header_bytes() const { return kPanel * scale_bytes() * (offsets ? 2 : 1); }
  int64_t group_bytes() const { return group_header_bytes() + group_rows() * kPanel * bits / 8; }
  int64_t panel_bytes() const {
    return bits == 16 ? round_up(k, kDepth) * kPanel * static_cast<int64_t>(sizeof(bf16)) : groups() * group_bytes();
  }
  int64_t bytes() const { return panels() * panel_bytes(); }
  const char* panel(int64_t i) const { return data + i * panel_bytes(); }
  // What `depth` rows of K of a panel take as bf16; nothing when they are bf16 where they lie.
  int64_t expanded_bytes(int64_t depth) const {
    return bits == 16 ? 0 : round_up(depth, kQuantisedDepth) * kPanel * static_cast<int64_t>(sizeof(bf16));
  }
  int middle() const { return bits == 8 ? 128 : 8; }
};

}  // namespace distinf
