// A checkpoint's own numbers and scales into the order the kernels read them: nothing is rounded.
#include <algorithm>
#include <cstring>

#include "pack.h"

namespace distinf {
namespace {

// Numbers of one column and group, from 0 up; 4-bit ones join the other half of the panel in a byte.
void place_numbers(const uint8_t* from, int64_t n, int bits, int64_t column, uint8_t* to) {
  if (bits == 8) {
    for (int64_t i = 0; i < n; i++) to[(i / 4 * kPanel + column) * 4 + i % 4] = from[i];
    return;
  }
  const int shift = column < kPanel / 2 ? 0 : 4;
  for (int64_t i = 0; i < n; i++) {
    uint8_t& both = to[(i / 4 * (kPanel / 2) + column % (kPanel / 2)) * 4 + i % 4];
    both = static_cast<uint8_t>(both | from[i] << shift);
  }
}

}  // namespace

void pack_integers(const uint8_t* numbers, int64_t stride, const char* scales, const char* offsets, RowRange rows,
                   bool up, const Weight& weight) {
  const int64_t size = weight.scale_bytes(), groups = weight.groups();
  const int64_t width = weight.panel_columns();
  for (int64_t row = 0; row < rows.count; row++) {
    const int64_t column = (rows.first + row) % width + (up ? width : 0);
    char* panel = weight.data + (rows.first + row) / width * weight.panel_bytes();
    if (column == 0) std::memset(panel, 0, weight.panel_bytes());
    for (int64_t group = 0; group < groups; group++) {
      char* header = panel + group * weight.group_bytes();
      std::memcpy(header + column * size, scales + (row * groups + group) * size, size);
      if (offsets) std::memcpy(header + (kPanel + column) * size, offsets + (row * groups + group) * size, size);
      const int64_t start = group * weight.group_rows(), n = std::min(weight.group_rows(), weight.k - start);
      auto* to = reinterpret_cast<uint8_t*>(header + weight.group_header_bytes());
      place_numbers(numbers + row * stride + start, n, weight.bits, column, to);
    }
  }
}

}  // namespace distinf
