// int8, w8a8 and int4 GEMM with vector instructions: whole-number dot products over a group, then one
// multiply-add in fp32 with its scale.

// Accumulators: rows x digits x vectors of a panel; 16 of 32 registers on AVX-512, 8 of 16 on AVX2.
template <int kDigits>
constexpr int kMaxQuantisedRows = (kLanes == 16 ? 8 : 2) / kDigits;
// Quads of rows of K between one look ahead and the next: as many as the smallest group has.
constexpr int64_t kStepQuads = 8;

// What one group adds to a result, for one vector of columns: acc has its whole-number products, one for each
// digit of the row, `sums` the sums of those digits.
template <int kDigits>
inline Vec group_result(const Weight& w, const char* header, int v, const Whole* acc, const int32_t* sums) {
  const auto digit = [&](int d) {
    return to_vec(w.offsets ? acc[d] : sub_whole(acc[d], broadcast_whole(w.middle() * sums[d])));
  };
  Vec y = digit(0);
  float sum = static_cast<float>(sums[0]);
  if constexpr (kDigits == 2) {
    y = fma(y, broadcast(128.0f), digit(1));
    sum = 128 * sum + static_cast<float>(sums[1]);
  }
  y = mul(y, load_scales(w, header, v * kLanes));
  return w.offsets ? fma(broadcast(sum), load_scales(w, header, kPanel + v * kLanes), y) : y;
}

template <int kBits, int kDigits, int kRows>
inline void quantised_panel_rows(const LinearArgs& args, const QuantisedRows& q, int64_t panel, int64_t row,
                                 Ahead ahead) {
  const Weight& w = args.w;
  const char* header = w.panel(panel);
  const int64_t quads_in_group = w.group_rows() / 4;
  Vec total[kRows][kVectors];
  for (auto& r : total) {
    for (Vec& v : r) v = zero();
  }
  for (int64_t group = 0; group < q.groups; group++, header += w.group_bytes()) {
    Whole acc[kRows][kDigits][kVectors];
    for (int i = 0; i < kRows * kDigits * kVectors; i++) (&acc[0][0][0])[i] = zero_whole();
    const auto* p = reinterpret_cast<const uint8_t*>(header + w.group_header_bytes());
    const auto multiply = [&](int64_t quad) {
      Whole columns[kVectors];
      load_quads<kBits>(p + quad * kPanel * kBits / 2, columns);
      for (int r = 0; r < kRows; r++) {
        for (int d = 0; d < kDigits; d++) {
          const Whole xr = broadcast_quad(q.digit(w, row + r, d) + (group * quads_in_group + quad) * 4);
          for (int v = 0; v < kVectors; v++) acc[r][d][v] = dot_quads(acc[r][d][v], columns[v], xr);
        }
      }
    };
    for (int64_t quad = 0; quad < quads_in_group; quad += kStepQuads) {
      ahead.next();
#pragma GCC unroll 1
      for (int64_t i = 0; i < kStepQuads; i++) multiply(quad + i);
    }
    for (int r = 0; r < kRows; r++) {
      for (int v = 0; v < kVectors; v++) {
        Whole digits[kDigits];
        for (int d = 0; d < kDigits; d++) digits[d] = acc[r][d][v];
        total[r][v] = add(total[r][v], group_result<kDigits>(w, header, v, digits, q.sum(w, row + r, group)));
      }
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int v = 0; v < kVectors; v++) total[r][v] = mul(total[r][v], broadcast(q.scales[row + r]));
    store_row(args, row + r, panel, total[r]);
  }
}

template <int kBits, int kDigits, int kRows>
inline void quantised_pass(const LinearArgs& args, const QuantisedRows& q, int64_t panel, int64_t row, int64_t rows,
                           const Ahead& ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return quantised_panel_rows<kBits, kDigits, kRows>(args, q, panel, row, ahead);
    quantised_pass<kBits, kDigits, kRows - 1>(args, q, panel, row, rows, ahead);
  }
}

template <int kBits, int kDigits>
inline void quantised_panels(const Worker& w, const LinearArgs& args) {
  constexpr int kRows = kMaxQuantisedRows<kDigits>;
  const QuantisedRows q = quantise(w, args);
  const Passes passes(args.m, kRows);
  const int64_t steps = args.w.groups() * (args.w.group_rows() / 4 / kStepQuads);
  for (int64_t panel = w.begin(args.w.panels()); panel < w.end(args.w.panels()); panel++) {
    for (int64_t pass = 0; pass < passes.count; pass++) {
      const int64_t row = passes.begin(pass), rows = passes.begin(pass + 1) - row;
      quantised_pass<kBits, kDigits, kRows>(args, q, panel, row, rows, {args.w, w, panel, passes, pass, steps});
    }
  }
}

// Whether to make each panel bf16 once for all rows. With VNNI that saves every row the ends of small groups; without,
// bf16 products are the faster ones. The limits are measured (perf/LOG.md).
inline bool expands(const Weight& w, int64_t rows) {
  if (w.digits == 1) return false;
#ifdef DISTINF_HAS_BF16
  return w.group && w.group <= 64 && 2 * rows >= w.group;
#else
  return rows >= (kLanes == 8 && !w.group ? 32 : 13);
#endif
}

void linear_quantised(const Worker& w, const LinearArgs& args) {
  if (expands(args.w, args.m)) return linear_bf16(w, args);
  if (args.w.bits == 4) return quantised_panels<4, 2>(w, args);
  args.w.digits == 1 ? quantised_panels<8, 1>(w, args) : quantised_panels<8, 2>(w, args);
}

int64_t linear_scratch_bytes(const Weight& w, int64_t rows, int workers) {
  if (w.bits == 16) return 0;
  const int64_t digits = quantised_scratch_bytes(w, rows, workers);
  return expands(w, rows) ? std::max(digits, workers * w.expanded_bytes(w.k)) : digits;
}
