// The functions that exist once per instruction set. Dispatch is one table, chosen when a Runtime is made.
#pragma once
#include <cstdint>
#include <limits>

#include "bf16.h"
#include "thread_team.h"
#include "weight.h"

namespace distinf {

enum class Act { kNone, kSilu, kGelu, kGeluTanh, kRelu };

// out[m, n] (fp32 or bf16) = act(x[m, k] . w[n, k]^T (+ bias[n])); of a gated weight, the first half of those n
// results through act, times the second half: out[m, n / 2]
struct LinearArgs {
  const bf16* x;  // [m, k], row stride x_stride
  int64_t x_stride;
  Weight w;
  const float* bias;  // [n] or nullptr
  Act act;
  void* out;  // row stride out_stride
  int64_t out_stride;
  bool out_fp32;
  int64_t m;
  char* scratch;                // 64-byte aligned: quantised rows of x, partial sums, panels made bf16
  const float* plus = nullptr;  // added to out, which it is like
};

// Vectors whose sum, formed in this order, is meant: one, or the partial results of several ranks.
struct Parts {
  const void* const* data;
  int count;
  bool bf16;  // else fp32
};

// x[rows, n] += add (when it has parts), then out = its norm: x / rms(x) * weight, or of layer_norm
// (x - mean) / deviation * weight + bias
struct NormArgs {
  float* x;
  Parts add;
  const float* weight;
  const float* bias;  // nullptr: rms_norm
  bf16* out;
  int64_t rows, n;
  float eps;
  char* scratch;  // norm_scratch_bytes(workers, n)
};

// A row is summed up in pieces of so many columns, which are joined in their order whoever has read them: its bits do
// not depend on the number of workers, so that ranks of unequal size send a token to the same experts.
constexpr int64_t kNormPiece = 256;
constexpr int64_t norm_pieces(int64_t n) { return (n + kNormPiece - 1) / kNormPiece; }

// What a worker knows of its pieces, up to three floats each, lies on cache lines of its own: for each of fewer rows
// than workers.
constexpr int64_t norm_scratch_stride(int64_t workers, int64_t n) {
  return round_up(workers * ((norm_pieces(n) + workers - 1) / workers) * 3 * 4, 64);
}
constexpr int64_t norm_scratch_bytes(int64_t workers, int64_t n) { return workers * norm_scratch_stride(workers, n); }

// Which rows of a step belong to which sequence, and where their keys and values lie.
struct BatchArgs {
  const int32_t* positions;    // [rows] place of the row in its sequence
  const int32_t* sequence;     // [rows] sequence of the row
  const int32_t* block_table;  // [sequences, max_blocks] block of the cache that holds positions i*block ..
  int64_t max_blocks;
  int64_t rows;
};

// Positions of a cache block: attention takes its keys block by block.
constexpr int64_t kBlockSize = 64;

// Paged keys and values of one layer, this rank's heads: bf16, or int8 with a scale for each position and head.
struct CacheArgs {
  void* k;  // [blocks, kv_heads, kBlockSize, head_dim]
  void* v;
  float* k_scale;  // [blocks, kv_heads, kBlockSize]; nullptr: the cache is bf16
  float* v_scale;
  int64_t kv_heads, head_dim;
};

// Longest head that the scratch below has room for: DeepSeek's latent vector of 512 and the 64 that rotate.
constexpr int64_t kMaxHeadDim = 576;
// Query vectors (rows x heads of a group) that share one pass over their keys and values. At head_dim 64 their
// accumulators are 16 KiB and a block of keys and values as much again: together they stay in a 1 MiB L2, and
// turning the keys costs each query 1/64 of a turn.
constexpr int64_t kTileQueries = 64;

// From one query to the next in the scratch below: four AMX tiles of sums in a row (attention_amx.cpp).
constexpr int64_t query_stride(int64_t head_dim) { return round_up(head_dim, 64); }

// Softmax-weighted values of a tile's queries over some of their keys, not yet divided by the sum of the weights.
struct Partial {
  float max[kTileQueries];  // largest score; weights are e^(score - max)
  float sum[kTileQueries];  // of the weights
  float acc[kTileQueries * kMaxHeadDim];
};

// One thread's memory while attention runs.
struct alignas(64) AttentionScratch {
  Partial begun_before;  // of a tile whose first keys are an earlier thread's
  Partial own;           // of the tile at work; in the end of the one that later threads go on with
  bf16 q[kTileQueries * kMaxHeadDim];
  int64_t first_key[kTileQueries], end_key[kTileQueries];  // positions that each query sees
  float slope[kTileQueries];                               // of each query's head; 0 without slopes
  bf16 k_rows[kBlockSize * kMaxHeadDim];                   // int8 keys made bf16
  bf16 k_pairs[kBlockSize * kMaxHeadDim];                  // [head_dim / 2][kBlockSize][2]
  bf16 v_pairs[kBlockSize * kMaxHeadDim];                  // [head_dim / 64][kBlockSize / 2][64][2], for AMX
  float k_scale[kBlockSize], v_scale[kBlockSize];
  float softcap;  // of AttentionArgs
  bool slopes;    // whether they are given there
};

struct AttentionArgs {
  const bf16* q;  // [rows, q_heads, head_dim], row stride q_stride
  int64_t q_stride;
  bf16* out;  // [rows, q_heads, head_dim], contiguous
  int64_t q_heads;
  int64_t group;         // query heads per KV head in the whole model
  int64_t group_offset;  // place of local query head 0 in its group: local KV head = (group_offset + head) / group
  int64_t window;        // keys a row may see, itself included; 0: all
  float scale;
  float softcap;              // c: a score s becomes c tanh(s / c); 0: as it is
  const float* slopes;        // [q_heads] a score rises by this a position; nullptr: none
  AttentionScratch* scratch;  // one for each thread
};

struct ExpertSumArgs {
  const float* y;              // [rows * top_k, n], grouped by expert
  const float* weights;        // [rows, top_k]
  const int32_t* place;        // [rows, top_k] row of y
  const int32_t *first, *end;  // rows of y that are added: *first .. *end; the others are another rank's
  const float* plus;           // [rows, n] or nullptr
  const float* gate;           // [rows] or nullptr: `plus` as it is
  int64_t rows, top_k, n;
  float* out;  // [rows, n]
};

struct KernelTable {
  void (*linear_bf16)(const Worker&, const LinearArgs&);
  void (*linear_quantised)(const Worker&, const LinearArgs&);
  // Scratch that a linear over at most so many rows needs of either.
  int64_t (*linear_scratch_bytes)(const Weight&, int64_t rows, int workers);
  void (*rms_norm)(const Worker&, const NormArgs&);
  void (*layer_norm)(const Worker&, const NormArgs&);
  // out[begin .. end] (fp32 or bf16) = sum of the parts. One thread's work.
  void (*sum_parts)(const Parts&, int64_t begin, int64_t end, void* out, bool out_bf16);
  // x[rows, heads, head_dim] in place: each head / rms * weight
  void (*head_norm)(const Worker&, bf16* x, int64_t stride, const float* weight, int64_t rows, int64_t heads,
                    int64_t head_dim, float eps);
  // x[n] += y[n], which is fp32 or bf16
  void (*add_rows)(const Worker&, float* x, const void* y, bool fp32, int64_t n);
  // Rotates the first 2*half elements of each of heads [rows, heads, head_dim] in place; cos, sin [rows, half].
  void (*rope)(const Worker&, bf16* x, int64_t stride, const float* cos, const float* sin, int64_t rows, int64_t heads,
               int64_t head_dim, int64_t half);
  void (*kv_append)(const Worker&, const bf16* k, const bf16* v, int64_t stride, const CacheArgs&, const BatchArgs&);
  void (*attention)(const Worker&, const AttentionArgs&, const CacheArgs&, const BatchArgs&);
  // x[n] = cap tanh(x / cap)
  void (*softcap)(const Worker&, float* x, int64_t n, float cap);
  void (*expert_sum)(const Worker&, const ExpertSumArgs&);
  // out[rows, n] fp32 = scale * table[ids]
  void (*embedding)(const Worker&, const int32_t* ids, const bf16* table, float scale, float* out, int64_t rows,
                    int64_t n);
  // This worker's part of bytes at data, read once; with software prefetch or without.
  int32_t (*read_stream)(const Worker&, const void* data, int64_t bytes, bool prefetch);
  // bf16 multiply-adds on registers; returns the floating-point operations done.
  double (*peak_bf16)(int64_t iterations, float* sink);
  double (*peak_int8)(int64_t iterations, float* sink);
};

extern const KernelTable kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kAmxKernels;

}  // namespace distinf
