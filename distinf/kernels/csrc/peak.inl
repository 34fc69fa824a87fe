// The most this instruction set does: multiply-adds on registers, as many chains as hide their latency.
constexpr int kChains = kLanes == 16 ? 12 : 8;

// x, as far as the compiler knows a new value each time: what an instruction set needs to unpack it is done each time.
template <class T>
inline T opaque(T x) {
  asm volatile("" : "+x"(x));
  return x;
}

// Returns the floating-point operations done; sink keeps the compiler from dropping them.
double peak_bf16(int64_t iterations, float* sink) {
  static const bf16 zeros[2 * kLanes] = {};
  const Pairs a = opaque(load_pairs(zeros));
  Vec acc[kChains];
  for (Vec& v : acc) v = zero();
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; c++) acc[c] = dot_pairs(acc[c], opaque(a), a);
  }
  Vec total = zero();
  for (const Vec& v : acc) total = add(total, v);
  *sink = sum(total);
  return 2.0 * 2 * kLanes * kChains * static_cast<double>(iterations);
}

// The same for int8 products with int32 sums.
double peak_int8(int64_t iterations, float* sink) {
  static const uint8_t zeros[4 * kLanes] = {};
  const Whole a = opaque(load_bytes(zeros));
  Whole acc[kChains];
  for (Whole& v : acc) v = zero_whole();
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; c++) acc[c] = dot_quads(acc[c], opaque(a), a);
  }
  Vec total = zero();
  for (const Whole& v : acc) total = add(total, to_vec(v));
  *sink = sum(total);
  return 2.0 * 4 * kLanes * kChains * static_cast<double>(iterations);
}
