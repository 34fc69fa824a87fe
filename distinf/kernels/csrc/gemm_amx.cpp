// bf16 GEMM on AMX tiles: the packed panels of the vector kernels are read as two B tiles per 32 rows of K.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "amx_tiles.h"
#include "gemm_amx.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")

namespace distinf {
namespace {

// The last, partial 32 columns of x, with zeros behind them: a tile load would run past the row.
struct Tail {
  alignas(64) bf16 rows[2 * kTileRows][kDepth];

  Tail(const LinearArgs& args, int64_t row, int64_t rows_used) {
    const int64_t from = args.w.k / kDepth * kDepth;
    std::memset(rows, 0, sizeof rows);
    for (int64_t r = 0; r < rows_used; r++) {
      std::memcpy(rows[r], args.x + (row + r) * args.x_stride + from, (args.w.k - from) * sizeof(bf16));
    }
    // gcc 12's _tile_loadd declares no memory input: without this the copies above could be dropped.
    asm volatile("" ::"r"(rows) : "memory");
  }
};

template <bool kTwo>
inline void multiply(const bf16* x, int64_t stride_bytes, const bf16* w) {
  constexpr int64_t kPairBytes = kPanel * 2 * sizeof(bf16);
  _tile_loadd(6, w, kPairBytes);
  _tile_loadd(7, w + kPanel, kPairBytes);
  _tile_loadd(4, x, stride_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo) {
    _tile_loadd(5, reinterpret_cast<const char*>(x) + kTileRows * stride_bytes, stride_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// c[2 * kTileRows][kPanel] = up to 32 rows of x times one panel.
template <bool kTwo>
inline void tile_block(const LinearArgs& args, const bf16* w, int64_t row, const Tail* tail, float* c) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const bf16* x = args.x + row * args.x_stride;
  const int64_t stride_bytes = args.x_stride * sizeof(bf16);
  for (int64_t k = 0; k + kDepth <= args.w.k; k += kDepth) multiply<kTwo>(x + k, stride_bytes, w + k * kPanel);
  if (tail) multiply<kTwo>(tail->rows[0], kRowBytes, w + args.w.k / kDepth * kDepth * kPanel);
  constexpr int64_t kStride = kPanel * sizeof(float);
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + kTileRows, kStride);
  if constexpr (kTwo) {
    _tile_stored(2, c + kTileRows * kPanel, kStride);
    _tile_stored(3, c + kTileRows * kPanel + kTileRows, kStride);
  }
}

void store(const LinearArgs& args, const float* c, int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = std::min(kPanel, args.w.n - column);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = (row + r) * args.out_stride + column;
    for (int64_t i = 0; i < columns; i++) {
      const float y = c[r * kPanel + i] + (args.bias ? args.bias[column + i] : 0.0f);
      if (args.out_fp32) {
        static_cast<float*>(args.out)[at + i] = y;
      } else {
        static_cast<bf16*>(args.out)[at + i] = to_bf16(y);
      }
    }
  }
}

void row_block(const Worker& w, const LinearArgs& args, int64_t row, int64_t rows) {
  const int64_t first = std::min(rows, kTileRows), second = rows - first;
  const Tail tail(args, row, args.w.k % kDepth ? rows : 0);
  const Tail* tail_used = args.w.k % kDepth ? &tail : nullptr;
  const int64_t panels = args.w.panels();
  alignas(64) float c[2 * kTileRows * kPanel];
  configure_tiles(first, second, kRowBytes);
  for (int64_t panel = w.begin(panels); panel < w.end(panels); panel++) {
    const auto* weights = reinterpret_cast<const bf16*>(args.w.panel(panel));
    if (second) {
      tile_block<true>(args, weights, row, tail_used, c);
    } else {
      tile_block<false>(args, weights, row, tail_used, c);
    }
    store(args, c, row, rows, panel * kPanel);
  }
}

}  // namespace

void linear_bf16_amx(const Worker& w, const LinearArgs& args) {
  for (int64_t row = 0; row < args.m; row += 2 * kTileRows) {
    row_block(w, args, row, std::min(2 * kTileRows, args.m - row));
  }
  _tile_release();
}

double peak_bf16_amx(int64_t iterations, float* sink) {
  configure_tiles(kTileRows, kTileRows, kRowBytes);
  for (int64_t i = 0; i < iterations; i++) {  // the four products of a 2 x 2 tile block, as in tile_block
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float c[kTileRows * kTileRows];
  _tile_stored(0, c, kRowBytes);
  _tile_release();
  *sink = c[0];
  return 2.0 * 4 * kTileRows * kTileRows * kDepth * static_cast<double>(iterations);
}

}  // namespace distinf
