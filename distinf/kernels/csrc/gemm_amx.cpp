// bf16 GEMM on AMX tiles: the packed panels of the vector kernels are read as two B tiles per 32 rows of K. Of a
// quantised weight each part of a panel is made bf16 first, once for a chunk of rows.
//
// Loop order, outside in: chunks of rows, chunks of K, this worker's panels, blocks of 32 rows. A chunk of x (rows x
// K) stays in the L2 cache while all panels pass by, and a panel's part stays near while the row blocks do, so weights come
// from memory once for each chunk of rows. Partial sums of a chunk of K wait in scratch.
#include "gemm_amx.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "amx_tiles.h"

#pragma GCC diagnostic ignored "-Wunused-function"  // of the shared kernels only the end of a row is used here
#define DISTINF_HAS_BF16
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16")

namespace distinf {
namespace {
#include "vec_avx512.h"
#include "elementwise.inl"
#include "act.inl"
#include "panel.inl"
#include "gemm_bf16.inl"

constexpr int64_t kBlockRows = 2 * kTileRows;
// 256 rows x 2048 of K in bf16 are 1 MiB: half of the L2 cache of the CPUs that have AMX. A panel's part (128 KiB)
// is then read for 8 row blocks of 4096 tile cycles each: 4 bytes a cycle, within one core's share of the memory.
constexpr int64_t kChunkRows = 256;
constexpr int64_t kChunkDepth = 2048;

// One worker's.
struct Scratch {
  float* sums;     // [panels or 1][rows of a chunk][kPanel]
  bf16* expanded;  // kChunkDepth rows of K of a quantised panel
};

// A panel's sums: of the largest chunk of `rows`, in whole row blocks.
int64_t sums_of_panel(int64_t rows) { return std::min(kChunkRows, round_up(rows, kBlockRows)) * kPanel; }

// Of one worker. Without a second chunk of K the sums of a panel are stored before the next one starts.
int64_t sums_bytes(const Weight& w, int64_t rows, int workers) {
  const int64_t panels = w.k > kChunkDepth ? (w.panels() + workers - 1) / workers : 1;
  return panels * sums_of_panel(rows) * static_cast<int64_t>(sizeof(float));
}

// A range of K, and up to 256 rows of x.
struct Chunk {
  int64_t row, rows;
  int64_t k, depth;
  bool first, last;  // of the chunks of K
};

// The last, partial 32 columns of x, with zeros behind them: a tile load would run past the row.
struct Tail {
  alignas(64) bf16 rows[kBlockRows][kDepth];

  Tail(const LinearArgs& args, int64_t row, int64_t count) {
    const int64_t from = args.w.k / kDepth * kDepth;
    std::memset(rows, 0, sizeof rows);
    for (int64_t r = 0; r < count; r++) {
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

template <bool kTwo>
inline void load_or_zero(const float* c, bool zero) {
  constexpr int64_t kStride = kPanel * sizeof(float);
  if (zero) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
    return;
  }
  asm volatile("" ::"r"(c) : "memory");
  _tile_loadd(0, c, kStride);
  _tile_loadd(1, c + kTileRows, kStride);
  if constexpr (kTwo) {
    _tile_loadd(2, c + kTileRows * kPanel, kStride);
    _tile_loadd(3, c + kTileRows * kPanel + kTileRows, kStride);
  }
}

// c[32][kPanel] (+)= up to 32 rows of x times a chunk of K of one panel.
template <bool kTwo>
inline void tile_block(const LinearArgs& args, const Chunk& chunk, int64_t row, const bf16* w, float* c) {
  const int64_t stride_bytes = args.x_stride * sizeof(bf16);
  const bf16* x = args.x + row * args.x_stride + chunk.k;
  const int64_t whole = chunk.depth / kDepth * kDepth;
  load_or_zero<kTwo>(c, chunk.first);
  for (int64_t k = 0; k < whole; k += kDepth) multiply<kTwo>(x + k, stride_bytes, w + k * kPanel);
  if (whole < chunk.depth) {
    const Tail tail(args, row, std::min(kBlockRows, chunk.row + chunk.rows - row));
    multiply<kTwo>(tail.rows[0], kRowBytes, w + whole * kPanel);
  }
  constexpr int64_t kStride = kPanel * sizeof(float);
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + kTileRows, kStride);
  if constexpr (kTwo) {
    _tile_stored(2, c + kTileRows * kPanel, kStride);
    _tile_stored(3, c + kTileRows * kPanel + kTileRows, kStride);
  }
}

// Rows [row, row + rows) of the result from c[rows][kPanel].
void store_rows(const LinearArgs& args, const float* c, int64_t row, int64_t rows, int64_t panel) {
  for (int64_t r = 0; r < rows; r++, c += kPanel) {
    Vec y[kVectors];
    for (int v = 0; v < kVectors; v++) y[v] = load(c + v * kLanes);
    store_row(args, row + r, panel, y);
  }
}

// Tile shapes of a row block; configuring clears the tiles, so it is done only when the rows change.
void configure_rows(int64_t rows, int64_t* configured) {
  if (rows == *configured) return;
  configure_tiles(std::min(rows, kTileRows), std::max<int64_t>(rows - kTileRows, 0), kRowBytes);
  *configured = rows;
}

// All row blocks of a chunk against one panel; sums[chunk rows][kPanel] carries them from one chunk of K to the next.
void panel_chunk(const LinearArgs& args, const Chunk& chunk, int64_t panel, const Scratch& scratch,
                 int64_t* configured) {
  const bf16* w = bf16_rows(args.w, panel, chunk.k, chunk.depth, scratch.expanded);
  // gcc 12's _tile_loadd declares no memory input: without this the stores of an expanded panel could be dropped.
  asm volatile("" ::"r"(w) : "memory");
  for (int64_t r = 0; r < chunk.rows; r += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, chunk.rows - r), row = chunk.row + r;
    float* c = scratch.sums + r * kPanel;
    configure_rows(rows, configured);
    rows > kTileRows ? tile_block<true>(args, chunk, row, w, c) : tile_block<false>(args, chunk, row, w, c);
    if (chunk.last) store_rows(args, c, row, rows, panel);
  }
}

}  // namespace

int64_t amx_scratch_bytes(const Weight& w, int64_t rows, int workers) {
  return workers * (sums_bytes(w, rows, workers) + w.expanded_bytes(kChunkDepth));
}

void linear_bf16_amx(const Worker& w, const LinearArgs& args) {
  const int64_t first = w.begin(args.w.panels()), last = w.end(args.w.panels());
  char* own = args.scratch + w.index * (amx_scratch_bytes(args.w, args.m, w.count) / w.count);
  auto* expanded = reinterpret_cast<bf16*>(own + sums_bytes(args.w, args.m, w.count));
  int64_t configured = 0;
  for (int64_t row = 0; row < args.m; row += kChunkRows) {
    for (int64_t k = 0; k < args.w.k; k += kChunkDepth) {
      const int64_t depth = std::min(kChunkDepth, args.w.k - k);
      const Chunk chunk{row, std::min(kChunkRows, args.m - row), k, depth, k == 0, k + depth == args.w.k};
      for (int64_t panel = first; panel < last; panel++) {
        const int64_t kept = args.w.k > kChunkDepth ? panel - first : 0;
        float* sums = reinterpret_cast<float*>(own) + kept * sums_of_panel(args.m);
        panel_chunk(args, chunk, panel, {sums, expanded}, &configured);
      }
    }
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
