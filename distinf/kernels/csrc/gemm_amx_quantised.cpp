// int8, w8a8 and int4 GEMM on AMX tiles: signed digits of x times the unsigned numbers of a packed panel.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "activations.h"
#include "amx_tiles.h"
#include "gemm_amx.h"

#pragma GCC diagnostic ignored "-Wunused-function"  // of the shared kernels only some helpers are used here
#define DISTINF_HAS_BF16
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8")

namespace distinf {
namespace {
#include "vec_avx512.h"
#include "elementwise.inl"
#include "act.inl"
#include "panel.inl"
#include "gemm_bf16.inl"
#include "activations.inl"
#include "gemm_quantised.inl"

// One pass of the tiles: two A tiles that share the panel. With two digits they are the digits of the same 16
// rows, with one digit two blocks of 16 rows.
struct Block {
  int64_t row;
  int64_t rows[2];       // in each A tile
  const int8_t* a[2];    // first byte of each
  int64_t stride_bytes;  // between rows of x
};

Block block_at(const LinearArgs& args, const QuantisedRows& q, int64_t row, int64_t end) {
  const int64_t left = end - row, stride = args.w.digits * q.k_padded;
  const int64_t first = std::min(left, kTileRows);
  const int8_t* a = q.digit(args.w, row, 0);
  if (args.w.digits == 2) return {row, {first, first}, {a, a + q.k_padded}, stride};
  return {row, {first, std::min(left - first, kTileRows)}, {a, a + kTileRows * stride}, stride};
}

// 4-bit numbers of up to 64 rows of K as bytes, [quads][kPanel][4].
void unpack_nibbles(const char* from, int64_t quads, uint8_t* to) {
  for (int64_t quad = 0; quad < quads; quad++, from += 64, to += 128) {
    const Whole both = load_bytes(reinterpret_cast<const uint8_t*>(from));
    _mm512_storeu_si512(to, low_nibbles(both));
    _mm512_storeu_si512(to + 64, high_nibbles(both));
  }
}

// c[4][16][16] int32 = both A tiles times both halves of one group of a panel.
void multiply_group(const Weight& w, const Block& block, const char* numbers, int64_t k, int32_t* c) {
  const int64_t depth = std::min(w.group_rows(), kQuantisedDepth);
  alignas(64) uint8_t unpacked[kQuantisedDepth * kPanel];
  _tile_zero(0);
  _tile_zero(1);
  if (block.rows[1]) {  // a tile without rows is not to be named
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < w.group_rows(); i += depth) {
    const char* b = numbers + i * kPanel * w.bits / 8;
    if (w.bits == 4) {
      unpack_nibbles(b, depth / 4, unpacked);
      b = reinterpret_cast<const char*>(unpacked);
    }
    // gcc 12's _tile_loadd declares no memory input: without this the stores above could be dropped.
    asm volatile("" ::"r"(b), "r"(unpacked) : "memory");
    _tile_loadd(6, b, kPanel * 4);
    _tile_loadd(7, b + 64, kPanel * 4);
    _tile_loadd(4, block.a[0] + k + i, block.stride_bytes);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (block.rows[1]) {
      _tile_loadd(5, block.a[1] + k + i, block.stride_bytes);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, c, kRowBytes);
  _tile_stored(1, c + 256, kRowBytes);
  if (block.rows[1]) {
    _tile_stored(2, c + 512, kRowBytes);
    _tile_stored(3, c + 768, kRowBytes);
  }
}

// total[rows][kPanel] += what the group adds
void add_group(const Weight& w, const QuantisedRows& q, const Block& block, const char* header, int64_t group,
               const int32_t* c, float* total) {
  const int64_t rows = w.digits == 2 ? block.rows[0] : block.rows[0] + block.rows[1];
  for (int64_t r = 0; r < rows; r++) {
    for (int v = 0; v < kVectors; v++) {
      Whole digits[2];
      for (int d = 0; d < w.digits; d++) {
        const int64_t tile_row = d * kTileRows + r;
        digits[d] = _mm512_loadu_si512(c + (tile_row / kTileRows * 2 + v) * 256 + tile_row % kTileRows * 16);
      }
      float* at = total + r * kPanel + v * kLanes;
      const int32_t* sums = q.sum(w, block.row + r, group);
      const Vec y =
          w.digits == 2 ? group_result<2>(w, header, v, digits, sums) : group_result<1>(w, header, v, digits, sums);
      store(at, add(load(at), y));
    }
  }
}

void panel_block(const LinearArgs& args, const QuantisedRows& q, const Block& block, int64_t panel) {
  const Weight& w = args.w;
  const int64_t rows = w.digits == 2 ? block.rows[0] : block.rows[0] + block.rows[1];
  alignas(64) int32_t c[4 * 256];
  alignas(64) float total[2 * kTileRows * kPanel] = {};
  const char* header = w.panel(panel);
  for (int64_t group = 0; group < q.groups; group++, header += w.group_bytes()) {
    multiply_group(w, block, header + w.group_header_bytes(), group * w.group_rows(), c);
    add_group(w, q, block, header, group, c, total);
  }
  for (int64_t r = 0; r < rows; r++) {
    const Vec scale = broadcast(q.scales[block.row + r]);
    Vec y[kVectors];
    for (int v = 0; v < kVectors; v++) y[v] = mul(load(total + r * kPanel + v * kLanes), scale);
    store_row(args, block.row + r, panel, y);
  }
}

}  // namespace

void linear_quantised_amx(const Worker& w, const LinearArgs& args) {
  const QuantisedRows q = quantise(w, args);
  const int64_t depth = std::min(args.w.group_rows(), kQuantisedDepth);
  const int64_t rows_at_once = args.w.digits == 2 ? kTileRows : 2 * kTileRows;
  // Rows whose digits fill about half of the L2 cache stay there while all panels pass by.
  const int64_t row_bytes = args.w.digits * q.k_padded;
  const int64_t chunk_rows = std::max<int64_t>(rows_at_once, (1 << 20) / row_bytes / rows_at_once * rows_at_once);
  int64_t configured = 0;
  for (int64_t chunk = 0; chunk < args.m; chunk += chunk_rows) {
    const int64_t end = std::min(chunk + chunk_rows, args.m);
    for (int64_t panel = w.begin(args.w.panels()); panel < w.end(args.w.panels()); panel++) {
      for (int64_t row = chunk; row < end; row += rows_at_once) {
        const Block block = block_at(args, q, row, end);
        if (configured != block.rows[0] * kQuantisedDepth + block.rows[1]) {  // configuring clears the tiles
          configure_tiles(block.rows[0], block.rows[1], depth);
          configured = block.rows[0] * kQuantisedDepth + block.rows[1];
        }
        panel_block(args, q, block, panel);
      }
    }
  }
  _tile_release();
}

double peak_int8_amx(int64_t iterations, float* sink) {
  configure_tiles(kTileRows, kTileRows, kQuantisedDepth);
  for (int64_t i = 0; i < iterations; i++) {  // the four products of multiply_group
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  alignas(64) int32_t c[kTileRows * 16];
  _tile_stored(0, c, kRowBytes);
  _tile_release();
  *sink = static_cast<float>(c[0]);
  return 2.0 * 4 * kTileRows * 16 * kQuantisedDepth * static_cast<double>(iterations);
}

}  // namespace distinf
