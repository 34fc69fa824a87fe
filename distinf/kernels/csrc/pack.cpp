#include "pack.h"

#include <emmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace distinf {
namespace {

inline bf16 as_bf16(float x) { return to_bf16(x); }
inline bf16 as_bf16(bf16 x) { return x; }

// Four pairs of bf16, elements i .. i + 7 of a row.
inline __m128i four_pairs(const bf16* row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row)); }
inline __m128i four_pairs(const float* row) {
  alignas(16) bf16 rounded[8];
  for (int i = 0; i < 8; i++) rounded[i] = to_bf16(row[i]);
  return four_pairs(rounded);
}

// Elements i .. i + 7 of four rows to four quads of pairs, kPanel pairs apart.
template <class T>
inline void transpose_pairs(const T* const* rows, int64_t i, bf16* to) {
  const __m128i a = four_pairs(rows[0] + i), b = four_pairs(rows[1] + i);
  const __m128i c = four_pairs(rows[2] + i), d = four_pairs(rows[3] + i);
  const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
  const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
  const __m128i quads[4] = {_mm_unpacklo_epi64(ab_low, cd_low), _mm_unpackhi_epi64(ab_low, cd_low),
                            _mm_unpacklo_epi64(ab_high, cd_high), _mm_unpackhi_epi64(ab_high, cd_high)};
  for (int j = 0; j < 4; j++) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * kPanel * 2), quads[j]);
}

// src[columns][k] into columns `first` .. of a panel of zeros. Pairs of four columns are turned over together in SSE2,
// which every x86-64 has: four times the speed of one pair at a time, and loading is mostly this.
template <class T>
void pack_columns_bf16(const T* src, int64_t stride, int64_t columns, const Weight& w, char* panel, int64_t first) {
  auto* to = reinterpret_cast<bf16*>(panel) + 2 * first;
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4) {
    const T* from[4] = {src + c * stride, src + (c + 1) * stride, src + (c + 2) * stride, src + (c + 3) * stride};
    int64_t i = 0;
    for (; i + 8 <= w.k; i += 8) transpose_pairs(from, i, to + (i / 2 * kPanel + c) * 2);
    for (; i < w.k; i++) {
      for (int j = 0; j < 4; j++) to[(i / 2 * kPanel + c + j) * 2 + i % 2] = as_bf16(from[j][i]);
    }
  }
  for (; c < columns; c++) {
    for (int64_t i = 0; i < w.k; i++) to[(i / 2 * kPanel + c) * 2 + i % 2] = as_bf16(src[c * stride + i]);
  }
}

// A number n stands for scale * n + offset.
struct Grid {
  float scale, offset;
};

// The grid that a group of weights is rounded to. bf16 scales and offsets are what is stored, so they are what is
// rounded with.
template <class T>
Grid grid_of(const T* x, int64_t n, const Weight& w) {
  float low = to_float(x[0]), high = low;
  for (int64_t i = 1; i < n; i++) {
    low = std::min(low, to_float(x[i]));
    high = std::max(high, to_float(x[i]));
  }
  const auto rounded = [](float x) { return to_float(to_bf16(x)); };
  if (w.offsets) return {rounded((high - low) / static_cast<float>((1 << w.bits) - 1)), rounded(low)};
  low = std::min(low, 0.0f);
  high = std::max(high, 0.0f);
  // Of eight bits 255 steps are used, as many above zero as below. Sixteen steps have one more below zero: the
  // larger side gets it, by the sign of the scale.
  const float scale = rounded(w.bits == 8 ? std::max(high, -low) / 127 : (high > -low ? high : low) / -8);
  return {scale, -scale * static_cast<float>(w.middle())};
}

template <class T>
void pack_group(const T* x, int64_t n, const Weight& w, char* group, int64_t column) {
  const Grid grid = grid_of(x, n, w);
  reinterpret_cast<bf16*>(group)[column] = to_bf16(grid.scale);
  if (w.offsets) reinterpret_cast<bf16*>(group)[kPanel + column] = to_bf16(grid.offset);
  auto* numbers = reinterpret_cast<uint8_t*>(group + w.group_header_bytes());
  const float inverse = grid.scale != 0 ? 1 / grid.scale : 0;
  const int last = (1 << w.bits) - 1, first = w.bits == 8 && !w.offsets ? 1 : 0;
  for (int64_t i = 0; i < n; i++) {
    // Without offsets the middle is added after rounding: it is a whole number.
    const float steps = w.offsets ? (to_float(x[i]) - grid.offset) * inverse : to_float(x[i]) * inverse;
    const int middle = w.offsets || grid.scale == 0 ? 0 : w.middle();
    const int number = std::clamp(middle + static_cast<int>(std::lrint(steps)), first, last);
    if (w.bits == 8) {
      numbers[(i / 4 * kPanel + column) * 4 + i % 4] = static_cast<uint8_t>(number);
    } else {
      uint8_t& both = numbers[(i / 4 * (kPanel / 2) + column % 16) * 4 + i % 4];
      both = static_cast<uint8_t>(both | number << (column / 16 * 4));
    }
  }
}

template <class T>
void pack_columns_quantised(const T* src, int64_t stride, int64_t columns, const Weight& w, char* panel,
                            int64_t first) {
  for (int64_t c = 0; c < columns; c++) {
    const T* from = src + c * stride;
    for (int64_t group = 0; group < w.groups(); group++) {
      const int64_t start = group * w.group_rows();
      pack_group(from + start, std::min(w.group_rows(), w.k - start), w, panel + group * w.group_bytes(), first + c);
    }
  }
}

}  // namespace

template <class T>
void pack(const T* src, int64_t stride, RowRange rows, bool up, const Weight& weight) {
  const auto pack_columns = weight.bits == 16 ? pack_columns_bf16<T> : pack_columns_quantised<T>;
  const int64_t width = weight.panel_columns();
  for (int64_t row = 0; row < rows.count; row += width) {
    char* panel = weight.data + (rows.first + row) / width * weight.panel_bytes();
    const int64_t columns = std::min(width, rows.count - row);
    if (!up) std::memset(panel, 0, weight.panel_bytes());
    pack_columns(src + row * stride, stride, columns, weight, panel, up ? width : 0);
  }
}

template void pack<float>(const float*, int64_t, RowRange, bool, const Weight&);
template void pack<bf16>(const bf16*, int64_t, RowRange, bool, const Weight&);

}  // namespace distinf
