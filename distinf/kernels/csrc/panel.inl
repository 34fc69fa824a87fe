// Reading a packed panel: its numbers and scales, what comes next, and a quantised one as bf16.

constexpr int kVectors = kPanel / kLanes;

// Rows of x in passes over a panel, as equal as they can be. A pass reads the panel in so many sweeps.
struct Passes {
  int64_t rows, count, sweeps;

  Passes(int64_t rows, int64_t most, int64_t sweeps = 1)
      : rows(rows), count((rows + most - 1) / most), sweeps(sweeps) {}
  int64_t begin(int64_t pass) const { return rows * pass / count; }
};

// DRAM latency (about 100 ns) at 20-40 GB/s per core.
constexpr int64_t kPrefetchBytes = 4096;

// What a pass over a panel asks for meanwhile, in `steps` equal steps of a sweep. One pass asks ahead of its reading, and
// so does the very first of several. The others would not wait for memory, but the first of each panel would: so each
// fetches its part of the worker's panel that follows into the L2 cache.
struct Ahead {
  const char *p, *end;
  int64_t step;
  bool near;

  Ahead(const Weight& w, const Worker& worker, int64_t panel, const Passes& passes, int64_t pass, int64_t steps) {
    const bool first = panel == worker.begin(w.panels()) && pass == 0, last = panel + 1 == worker.end(w.panels());
    near = first || passes.count * passes.sweeps == 1;
    step = w.panel_bytes() / (near ? steps : passes.count * passes.sweeps * steps) + 1;
    if (last && !near) step = 0;
    p = end = near ? w.panel(panel) + kPrefetchBytes : w.panel(panel + 1) + w.panel_bytes() * pass / passes.count;
  }

  void next() {
    end += step;
    if (near) {
      for (; p < end; p += 64) __builtin_prefetch(p, 0, 3);
    } else {
      for (; p < end; p += 64) __builtin_prefetch(p, 0, 2);
    }
  }
};

// The numbers of one quad of rows for the whole panel.
template <int kBits>
inline void load_quads(const uint8_t* p, Whole* quads) {
  if constexpr (kBits == 8) {
    for (int v = 0; v < kVectors; v++) quads[v] = load_bytes(p + v * 4 * kLanes);
  } else {
    for (int v = 0; v < kVectors / 2; v++) {
      const Whole both = load_bytes(p + v * 4 * kLanes);
      quads[v] = low_nibbles(both);
      quads[v + kVectors / 2] = high_nibbles(both);
    }
  }
}

// One vector of a group's scales, or of its offsets, which stand kPanel further on.
inline Vec load_scales(const Weight& w, const char* header, int64_t i) {
  if (w.scales == ScaleType::kBf16) return load(reinterpret_cast<const bf16*>(header) + i);
  if (w.scales == ScaleType::kFp16) return load(reinterpret_cast<const fp16*>(header) + i);
  return load(reinterpret_cast<const float*>(header) + i);
}

// Rows [from, end) of K, all of one group, in the order of a bf16 panel. Both are multiples of 4.
template <int kBits>
inline void expand_group(const Weight& w, const char* header, int64_t from, int64_t end, bf16* to) {
  Vec scales[kVectors], offsets[kVectors];
  for (int v = 0; v < kVectors; v++) {
    scales[v] = load_scales(w, header, v * kLanes);
    offsets[v] = w.offsets ? load_scales(w, header, kPanel + v * kLanes)
                           : mul(scales[v], broadcast(-static_cast<float>(w.middle())));
  }
  const auto* p = reinterpret_cast<const uint8_t*>(header + w.group_header_bytes()) + from * kPanel * kBits / 8;
  for (int64_t row = from; row < end; row += 4, p += kPanel * kBits / 2, to += 4 * kPanel) {
    __builtin_prefetch(p + kPrefetchBytes);
    if constexpr (kBits == 8) __builtin_prefetch(p + kPrefetchBytes + 64);
    Whole quads[kVectors];
    load_quads<kBits>(p, quads);
    for (int v = 0; v < kVectors; v++) {
      const auto weight = [&](Whole number) { return fma(to_vec(number), scales[v], offsets[v]); };
      const Vec k0 = weight(byte<0>(quads[v])), k1 = weight(byte<1>(quads[v]));
      const Vec k2 = weight(byte<2>(quads[v])), k3 = weight(byte<3>(quads[v]));
      store_pairs(to + v * 2 * kLanes, pairs_of(k0, k1));
      store_pairs(to + 2 * kPanel + v * 2 * kLanes, pairs_of(k2, k3));
    }
  }
}

// Rows [from, from + depth) of K of a panel as bf16: where they lie, or of a quantised weight expanded into `buffer`.
inline const bf16* bf16_rows(const Weight& w, int64_t panel, int64_t from, int64_t depth, bf16* buffer) {
  if (w.bits == 16) return reinterpret_cast<const bf16*>(w.panel(panel)) + from * kPanel;
  const int64_t last = round_up(from + depth, kDepth);  // the tiles of a last part read so far
  for (int64_t row = from; row < last;) {
    const int64_t group = row / w.group_rows(), first = group * w.group_rows();
    const int64_t end = std::min(last, first + w.group_rows());
    const auto expand = w.bits == 8 ? expand_group<8> : expand_group<4>;
    expand(w, w.panel(panel) + group * w.group_bytes(), row - first, end - first, buffer + (row - from) * kPanel);
    row = end;
  }
  return buffer;
}
