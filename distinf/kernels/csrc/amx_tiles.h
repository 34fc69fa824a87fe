// Tile configuration shared by the AMX kernels: C (rows x columns halves) in tiles 0-3, A of two row blocks in
// 4-5, B of two column halves in 6-7.
#pragma once
#include <cstdint>

namespace distinf {

constexpr int64_t kTileRows = 16;
constexpr int64_t kRowBytes = 64;

// first, second: rows of x in the two A tiles; second may be 0. depth_bytes: of a row of A; B has depth_bytes / 4
// rows.
void configure_tiles(int64_t first, int64_t second, int64_t depth_bytes);

}  // namespace distinf
