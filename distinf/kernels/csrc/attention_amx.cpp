// Attention with its two products on AMX tiles: 16 queries at a time against the 64 keys of a block. Tiling,
// softmax and merging are attention.inl's. Weights are rounded to bf16 for their product with the values.
#include "attention_amx.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "amx_tiles.h"

#pragma GCC diagnostic ignored "-Wunused-function"  // of the shared kernels only attention's are used here
#define DISTINF_HAS_BF16
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16")

namespace distinf {
namespace {
#include "vec_avx512.h"
#include "elementwise.inl"
#include "attention.inl"

// Up to so many queries take a block in by vectors, with weights in fp32. For a block at head_dim 64, vectors take 256
// cycles a query for the products (64 x 64 twice, 32 multiply-adds a cycle) and 30 for the softmax; tiles take some 600
// for the products of 1 to 16 queries, the turning of the values and the sums on their way. So tiles are ahead from
// three queries on, but so few are a decode step, which waits for memory: 16 KiB at 20 GB/s and 3 GHz are 2460
// cycles, the arithmetic of 8 queries by vectors.
constexpr int64_t kVectorQueries = 8;

// Columns of the four C tiles: the scores of a block's keys, or as many elements of the values.
constexpr int64_t kWide = 4 * kTileRows;
static_assert(kWide == kBlockSize && query_stride(1) == kWide && kTileQueries % kTileRows == 0);
constexpr int64_t kWideBytes = kWide * sizeof(float);  // of a row of the C tiles, and of a row of pairs

// gcc 12's _tile_loadd declares no memory input: without this, stores to what is loaded could be dropped.
inline void stored(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// C tiles += a[16][depth] . b[depth / 2][kWide][2], depth in whole tiles.
inline void multiply(const bf16* a, int64_t a_bytes, const bf16* b, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kDepth, a += kDepth, b += kDepth * kWide) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(5, b, kWideBytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + 2 * kTileRows, kWideBytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + 4 * kTileRows, kWideBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + 6 * kTileRows, kWideBytes);
    _tile_dpbf16ps(3, 4, 5);
  }
}

inline void load_sums(const float* c, int64_t row_bytes) {
  _tile_loadd(0, c, row_bytes);
  _tile_loadd(1, c + kTileRows, row_bytes);
  _tile_loadd(2, c + 2 * kTileRows, row_bytes);
  _tile_loadd(3, c + 3 * kTileRows, row_bytes);
}

inline void store_sums(float* c, int64_t row_bytes) {
  _tile_stored(0, c, row_bytes);
  _tile_stored(1, c + kTileRows, row_bytes);
  _tile_stored(2, c + 2 * kTileRows, row_bytes);
  _tile_stored(3, c + 3 * kTileRows, row_bytes);
}

// Values of a block's first keys to pairs: out[i / kWide][key / 2][i % kWide][2] = v[key][i], v[key + 1][i]. Keys that
// fill the last tile are zero: nobody may have written them.
template <class T, class Ask>
inline void turn_values(const T* v, int64_t d, int64_t keys, bf16* out, Ask ask) {
  const auto value = [&](int64_t key, int64_t i) {
    return _mm512_castps_si512(key < keys ? load_n(v + key * d, i, d) : zero());
  };
  for (int64_t key = 0; key < round_up(keys, kDepth); key += 2) {
    ask(key);
    ask(key + 1);
    for (int64_t i = 0; i < d; i += kLanes) {
      // bf16 and int8 are the upper halves of their fp32.
      const Pairs pairs = _mm512_or_si512(_mm512_srli_epi32(value(key, i), 16), value(key + 1, i));
      store_pairs(out + i / kWide * kWide * kBlockSize + key * kWide + i % kWide * 2, pairs);
    }
  }
}

// scores[16][kBlockSize] = q . keys, times each key's scale
inline void score_rows(const AttentionScratch& s, int64_t query, int64_t d, float (*scores)[kBlockSize]) {
  const int64_t stride = query_stride(d);
  stored(&s);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  multiply(s.q + query * stride, stride * sizeof(bf16), s.k_pairs, round_up(d, kDepth));
  store_sums(scores[0], kWideBytes);
  for (int64_t r = 0; r < kTileRows; r++) {
    for (int64_t i = 0; i < kBlockSize; i += kLanes) {
      store(scores[r] + i, mul(load(scores[r] + i), load(s.k_scale + i)));
    }
  }
}

// acc[16] = acc * keep + weights . values over some keys of a block
inline void add_values_rows(const AttentionScratch& s, const float (*weights)[kBlockSize], Span keys, const float* keep,
                            int64_t d, float* acc) {
  const int64_t stride = query_stride(d);
  alignas(64) bf16 rounded[kTileRows][kBlockSize];
  for (int64_t r = 0; r < kTileRows; r++) {
    for (int64_t i = 0; i < kBlockSize; i += kLanes) store(rounded[r] + i, load(weights[r] + i));
    if (keep[r] == 1) continue;  // no larger score came: true of most blocks
    const Vec kept = broadcast(keep[r]);
    for (int64_t i = r * stride; i < (r + 1) * stride; i += kLanes) store(acc + i, mul(load(acc + i), kept));
  }
  stored(rounded);
  const int64_t first = keys.begin / kDepth * kDepth, depth = round_up(keys.end, kDepth) - first;
  for (int64_t i = 0; i < d; i += kWide) {
    load_sums(acc + i, stride * sizeof(float));
    multiply(rounded[0] + first, sizeof rounded[0], s.v_pairs + i * kBlockSize + first * kWide, depth);
    store_sums(acc + i, stride * sizeof(float));
  }
}

// Queries [query, query + count) of the tile take in one block. Rows of the AMX tiles past `count` are noise that
// stays in rows which nobody reads.
template <class T>
inline void attend_rows(const AttentionScratch& s, const Block<T>& block, int64_t query, int64_t count, Partial& part) {
  const Span any = seen_by_any(s, block, query, count);
  if (any.begin >= any.end) return;
  alignas(64) float scores[kTileRows][kBlockSize], keep[kLanes];
  score_rows(s, query, block.d, scores);
  weigh_queries(s, block, query, count, scores, keep, part);
  add_values_rows(s, scores, any, keep, block.d, part.acc + query * query_stride(block.d));
}

struct ByTiles {
  template <class T>
  static void take_in(const Block<T>& block, int64_t count, AttentionScratch& s, Partial& part) {
    if (count <= kVectorQueries) return ByVectors::take_in(block, count, s, part);
    turn_values(block.v, block.d, block.at(s.end_key[count - 1]), s.v_pairs, block.next_k);
    for (int64_t query = 0; query < count; query += kTileRows) {
      attend_rows(s, block, query, std::min(kTileRows, count - query), part);
    }
  }
};

}  // namespace

void attention_amx(const Worker& w, const AttentionArgs& args, const CacheArgs& cache, const BatchArgs& batch) {
  configure_tiles(kTileRows, kTileRows, kRowBytes);
  attend_all<ByTiles>(w, args, cache, batch);
  _tile_release();
}

}  // namespace distinf
