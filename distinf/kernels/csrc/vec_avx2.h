// Eight fp32 lanes on AVX2 + FMA. Included inside namespace distinf::<isa> by isa_avx2.cpp only.
using Vec = __m256;
constexpr int kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store_past_caches(float* p, Vec v) { _mm256_stream_ps(p, v); }  // p is aligned
// Rounds to the nearest whole number, ties to even; lanes must be in [-128, 127].
inline void store(int8_t* p, Vec v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
// Rounded to bf16, which are the upper halves of the lanes.
inline __m256i nearest_bf16(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even_up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(even_up, _mm256_set1_epi32(0x7fc00000), nan);
}
inline void store(bf16* p, Vec v) {
  const __m256i high = _mm256_srli_epi32(nearest_bf16(v), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for whole n in [-126, 127]: n goes into the exponent field.
inline Vec exp2_whole(Vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline float sum(Vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Sixteen bits pairs (k, k+1) of eight columns, in the order the packed weights have them.
using Pairs = __m256i;
inline Pairs load_pairs(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
// The four pairs at p and at every step elements behind it, one lane of 128 bits each.
inline Pairs load_quads(const bf16* p, int64_t step) {
  const auto quad = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step)); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(quad(0)), quad(1), 1);
}
inline void store_pairs(bf16* p, Pairs v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
// Within each 128 bits: a0 b0 a1 b1, and a2 b2 a3 b3; by 64 bits: a01 b01, and a23 b23.
inline Pairs zip_low(Pairs a, Pairs b) { return _mm256_unpacklo_epi32(a, b); }
inline Pairs zip_high(Pairs a, Pairs b) { return _mm256_unpackhi_epi32(a, b); }
inline Pairs zip_low_two(Pairs a, Pairs b) { return _mm256_unpacklo_epi64(a, b); }
inline Pairs zip_high_two(Pairs a, Pairs b) { return _mm256_unpackhi_epi64(a, b); }
inline Pairs broadcast_pair(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm256_set1_epi32(pair);
}
// One pair a lane, rounded to bf16.
inline Pairs pairs_of(Vec low, Vec high) {
  return _mm256_blend_epi16(_mm256_srli_epi32(nearest_bf16(low), 16), nearest_bf16(high), 0xaa);
}
// The factors that a pair is multiplied as: one element, then the other. The index of the pair is handed through so
// that the compiler reads memory again for the second one: it has no registers to keep many pairs in.
struct LowHalf {
  Vec operator()(Pairs p) const { return _mm256_castsi256_ps(_mm256_slli_epi32(p, 16)); }
};
struct HighHalf {
  Vec operator()(Pairs p) const { return _mm256_castsi256_ps(_mm256_and_si256(p, _mm256_set1_epi32(int(0xffff0000)))); }
};
template <class F>
inline void for_factors(int64_t pair, F f) {
  f(LowHalf(), pair);
  asm volatile("" : "+r"(pair));
  f(HighHalf(), pair);
}
inline Vec dot_pairs(Vec acc, Vec a, Vec b) { return fma(a, b, acc); }
// acc + a.low * b.low + a.high * b.high, fp32
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
  return fma(HighHalf()(a), HighHalf()(b), fma(LowHalf()(a), LowHalf()(b), acc));
}

// Eight int32 lanes, or 32 bytes of them.
using Whole = __m256i;
inline Whole zero_whole() { return _mm256_setzero_si256(); }
inline Whole broadcast_whole(int32_t x) { return _mm256_set1_epi32(x); }
inline Whole load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Whole low_nibbles(Whole x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Whole high_nibbles(Whole x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
template <int kByte>  // of each lane, from its low end
inline Whole byte(Whole x) {
  return _mm256_and_si256(_mm256_srli_epi32(x, 8 * kByte), _mm256_set1_epi32(255));
}
inline Whole sub_whole(Whole a, Whole b) { return _mm256_sub_epi32(a, b); }
inline Vec to_vec(Whole x) { return _mm256_cvtepi32_ps(x); }
inline Whole to_whole(Vec v) { return _mm256_cvtps_epi32(v); }
inline Whole add_whole(Whole a, Whole b) { return _mm256_add_epi32(a, b); }
template <int kBits>
inline Whole shift_right(Whole x) {
  return _mm256_srai_epi32(x, kBits);
}
template <int kBits>
inline Whole shift_left(Whole x) {
  return _mm256_slli_epi32(x, kBits);
}
// The lanes, each within int8, as bytes.
inline void store_bytes(int8_t* p, Whole x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline Whole broadcast_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return _mm256_set1_epi32(quad);
}
// acc + the four products of unsigned bytes of w and signed bytes of x in each lane. The byte product of AVX2
// saturates, so both go through 16 bits.
inline Whole dot_quads(Whole acc, Whole w, Whole x) {
  const Whole even =
      _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const Whole odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
