#include "amx_tiles.h"

#include <immintrin.h>

#include <initializer_list>

#pragma GCC target("amx-tile")

namespace distinf {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace

void configure_tiles(int64_t first, int64_t second, int64_t depth_bytes) {
  TileConfig config;
  const auto set = [&](int tile, int64_t rows, int64_t row_bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(rows ? row_bytes : 0);
  };
  for (int tile : {0, 1}) set(tile, first, kRowBytes);
  for (int tile : {2, 3}) set(tile, second, kRowBytes);
  set(4, first, depth_bytes);
  set(5, second, depth_bytes);
  for (int tile : {6, 7}) set(tile, depth_bytes / 4, kRowBytes);
  // gcc 12 declares only 8 bytes of the configuration as an input and may drop the other stores.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace distinf
