// bf16 GEMM on packed panels with vector instructions: a panel is read from memory once and from the L2 cache for each
// further pass of kMaxRows rows. (One of K = 16384 and more no longer fits there.)

// Accumulators of a pass: 24 beside two weights and the broadcast in 32 (AVX-512) registers, 12 in 16 (AVX2).
constexpr int kMaxRows = kLanes == 16 ? 12 : 6;
// Vectors of a panel that a pass of so many rows takes at once. On AVX2 more than two rows sweep over each half.
constexpr int vectors_at_once(int64_t rows) { return rows > 2 ? 2 : kVectors; }
// Pairs of rows of K, eight lines of a panel, between one look ahead and the next.
constexpr int64_t kStepPairs = 4;

inline Vec with_bias(const float* bias, Vec y, int64_t i, int64_t n) { return bias ? add(y, load_n(bias, i, n)) : y; }

inline void store_result(const LinearArgs& args, int64_t row, Vec y, int64_t i, int64_t n) {
  if (args.plus) y = add(y, load_n(args.plus + row * args.out_stride, i, n));
  if (args.out_fp32) {
    store_n(static_cast<float*>(args.out) + row * args.out_stride, y, i, n);
  } else {
    store_n(static_cast<bf16*>(args.out) + row * args.out_stride, y, i, n);
  }
}

// store_row with an activation, which is too long to stand at the end of every kernel.
__attribute__((noinline)) void store_activated(const LinearArgs& args, int64_t row, int64_t panel, const Vec* sums) {
  const int64_t n = args.w.columns(), first = panel * args.w.panel_columns();
  const int vectors = args.w.gated ? kVectors / 2 : kVectors;
  for (int v = 0; v < vectors; v++) {
    const int64_t i = first + v * kLanes;
    if (i >= n) return;
    Vec y = activated(args.act, with_bias(args.bias, sums[v], i, n));
    if (args.w.gated) y = mul(y, with_bias(args.bias ? args.bias + n : nullptr, sums[v + vectors], i, n));
    store_result(args, row, y, i, n);
  }
}

// bf16 or fp32 results of one row of a panel from its sums; columns past the last are not written.
inline void store_row(const LinearArgs& args, int64_t row, int64_t panel, const Vec* acc) {
  if (args.act != Act::kNone) {
    Vec sums[kVectors];  // a copy, so that the accumulators themselves can stay in registers
    for (int v = 0; v < kVectors; v++) sums[v] = acc[v];
    return store_activated(args, row, panel, sums);
  }
  for (int v = 0; v < kVectors; v++) {
    const int64_t i = panel * kPanel + v * kLanes;
    if (i >= args.w.n) return;
    store_result(args, row, with_bias(args.bias, acc[v], i, args.w.n), i, args.w.n);
  }
}

template <int kRows>
inline void panel_rows(const LinearArgs& args, const bf16* w, int64_t panel, int64_t row, Ahead ahead) {
  constexpr int kAtOnce = vectors_at_once(kRows);
  const int64_t pairs = args.w.k / 2;
  const bf16* x = args.x + row * args.x_stride;
  Vec sums[kRows][kVectors];
  for (int first = 0; first < kVectors; first += kAtOnce) {
    Vec acc[kRows][kAtOnce];
    for (int i = 0; i < kRows * kAtOnce; i++) (&acc[0][0])[i] = zero();
    const auto multiply = [&](int64_t i) {
      for_factors(i, [&](auto factor, int64_t pair) {
        decltype(factor(Pairs())) columns[kAtOnce];
        for (int v = 0; v < kAtOnce; v++) {
          columns[v] = factor(load_pairs(w + (pair * kPanel + (first + v) * kLanes) * 2));
        }
        for (int r = 0; r < kRows; r++) {
          const auto xr = factor(broadcast_pair(x + r * args.x_stride + 2 * pair));
          for (int v = 0; v < kAtOnce; v++) acc[r][v] = dot_pairs(acc[r][v], xr, columns[v]);
        }
      });
    };
    int64_t pair = 0;
    for (; pair + kStepPairs <= pairs; pair += kStepPairs) {
      ahead.next();
      for (int64_t i = 0; i < kStepPairs; i++) multiply(pair + i);
    }
    for (; pair < pairs; pair++) multiply(pair);
    for (int r = 0; r < kRows; r++) {
      for (int v = 0; v < kAtOnce; v++) sums[r][first + v] = acc[r][v];
    }
  }
  for (int r = 0; r < kRows; r++) store_row(args, row + r, panel, sums[r]);
}

template <int kRows>
inline void panel_pass(const LinearArgs& args, const bf16* w, int64_t panel, int64_t row, int64_t rows,
                       const Ahead& ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return panel_rows<kRows>(args, w, panel, row, ahead);
    panel_pass<kRows - 1>(args, w, panel, row, rows, ahead);
  }
}

// Of a quantised weight, too: each panel is expanded once for all rows.
void linear_bf16(const Worker& w, const LinearArgs& args) {
  const Passes passes(args.m, kMaxRows, kVectors / vectors_at_once(args.m));
  const int64_t steps = std::max<int64_t>(args.w.k / 2 / kStepPairs, 1);
  auto* buffer = reinterpret_cast<bf16*>(args.scratch + w.index * args.w.expanded_bytes(args.w.k));
  for (int64_t panel = w.begin(args.w.panels()); panel < w.end(args.w.panels()); panel++) {
    const bf16* weights = bf16_rows(args.w, panel, 0, args.w.k, buffer);
    for (int64_t pass = 0; pass < passes.count; pass++) {
      const int64_t row = passes.begin(pass), rows = passes.begin(pass + 1) - row;
      panel_pass<kMaxRows>(args, weights, panel, row, rows, {args.w, w, panel, passes, pass, steps});
    }
  }
}
