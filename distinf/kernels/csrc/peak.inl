// The most this instruction set does: bf16 multiply-adds on registers, as many chains as hide their latency.

// Returns the floating-point operations done; sink keeps the compiler from dropping them.
double peak_bf16(int64_t iterations, float* sink) {
  constexpr int kChains = kLanes == 16 ? 12 : 8;
  static const bf16 ones[2 * kLanes] = {};
  const Pairs a = load_pairs(ones);
  Vec acc[kChains];
  for (Vec& v : acc) v = zero();
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; c++) acc[c] = dot_pairs(acc[c], a, a);
  }
  Vec total = zero();
  for (const Vec& v : acc) total = add(total, v);
  *sink = sum(total);
  return 2.0 * 2 * kLanes * kChains * static_cast<double>(iterations);
}
