#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace distinf {
namespace {

inline bf16 as_bf16(float x) { return to_bf16(x); }
inline bf16 as_bf16(bf16 x) { return x; }

template <class T>
void pack_panel_bf16(const T* src, int64_t stride, const Weight& w, int64_t panel) {
  auto* to = reinterpret_cast<bf16*>(w.data + panel * w.panel_bytes());
  std::memset(to, 0, w.panel_bytes());
  for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; c++) {
    const T* from = src + (panel * kPanel + c) * stride;
    for (int64_t i = 0; i < w.k; i++) to[(i / 2 * kPanel + c) * 2 + i % 2] = as_bf16(from[i]);
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
void pack_panel_quantised(const T* src, int64_t stride, const Weight& w, int64_t panel) {
  char* to = w.data + panel * w.panel_bytes();
  std::memset(to, 0, w.panel_bytes());
  for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; c++) {
    const T* from = src + (panel * kPanel + c) * stride;
    for (int64_t group = 0; group < w.groups(); group++) {
      const int64_t start = group * w.group_rows();
      pack_group(from + start, std::min(w.group_rows(), w.k - start), w, to + group * w.group_bytes(), c);
    }
  }
}

}  // namespace

template <class T>
void pack(const Worker& w, const T* src, int64_t stride, const Weight& weight) {
  for (int64_t panel = w.begin(weight.panels()); panel < w.end(weight.panels()); panel++) {
    (weight.bits == 16 ? pack_panel_bf16<T> : pack_panel_quantised<T>)(src, stride, weight, panel);
  }
}

template void pack<float>(const Worker&, const float*, int64_t, const Weight&);
template void pack<bf16>(const Worker&, const bf16*, int64_t, const Weight&);

}  // namespace distinf
