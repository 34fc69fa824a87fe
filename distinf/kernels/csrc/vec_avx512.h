// Sixteen fp32 lanes on AVX-512 (F, BW, VL, DQ); with DISTINF_HAS_BF16 also the bf16 instructions.
// Included inside namespace distinf::<isa> by isa_avx512.cpp and isa_avx512_bf16.cpp only.
using Vec = __m512;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store_past_caches(float* p, Vec v) { _mm512_stream_ps(p, v); }  // p is aligned
// Rounds to the nearest whole number, ties to even; lanes must be in [-128, 127].
inline void store(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
// Rounded to bf16, which are the upper halves of the lanes.
inline __m512i nearest_bf16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even_up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(even_up, nan, _mm512_set1_epi32(0x7fc00000));
}
inline void store(bf16* p, Vec v) {
#ifdef DISTINF_HAS_BF16
  const __m256i packed = (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest_bf16(v), 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for whole n in [-126, 127]: n goes into the exponent field.
inline Vec exp2_whole(Vec n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }

// Pairs (k, k+1) of sixteen columns, in the order the packed weights have them.
using Pairs = __m512i;
inline Pairs load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
// The four pairs at p and at every step elements behind it, one lane of 128 bits each.
inline Pairs load_quads(const bf16* p, int64_t step) {
  const auto quad = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step)); };
  // Broadcast loads under a mask go through the load ports: no shuffle is spent on putting lanes in place.
  Pairs v = _mm512_castsi128_si512(quad(0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, quad(1));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, quad(2));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, quad(3));
}
inline void store_pairs(bf16* p, Pairs v) { _mm512_storeu_si512(p, v); }
// Within each 128 bits: a0 b0 a1 b1, and a2 b2 a3 b3; by 64 bits: a01 b01, and a23 b23.
inline Pairs zip_low(Pairs a, Pairs b) { return _mm512_unpacklo_epi32(a, b); }
inline Pairs zip_high(Pairs a, Pairs b) { return _mm512_unpackhi_epi32(a, b); }
inline Pairs zip_low_two(Pairs a, Pairs b) { return _mm512_unpacklo_epi64(a, b); }
inline Pairs zip_high_two(Pairs a, Pairs b) { return _mm512_unpackhi_epi64(a, b); }
inline Pairs broadcast_pair(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
// One pair a lane, rounded to bf16.
inline Pairs pairs_of(Vec low, Vec high) {
#ifdef DISTINF_HAS_BF16
  // All of low, then all of high; lane i takes 16-bit words i and 16 + i.
  const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_permutexvar_epi16(
      _mm512_or_epi32(_mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16), lane), words);
#else
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(nearest_bf16(low), 16), nearest_bf16(high));
#endif
}
// acc + a.low * b.low + a.high * b.high, fp32
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
#ifdef DISTINF_HAS_BF16
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  const Vec a_low = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
            b_low = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
  const Vec a_high = _mm512_castsi512_ps(_mm512_and_si512(a, high)),
            b_high = _mm512_castsi512_ps(_mm512_and_si512(b, high));
  return fma(a_high, b_high, fma(a_low, b_low, acc));
#endif
}
// The factors that a pair is multiplied as: both elements at once (one after the other in vec_avx2.h).
struct WholePairs {
  Pairs operator()(Pairs p) const { return p; }
};
template <class F>
inline void for_factors(int64_t pair, F f) {
  f(WholePairs(), pair);
}

// Sixteen int32 lanes, or 64 bytes of them.
using Whole = __m512i;
inline Whole zero_whole() { return _mm512_setzero_si512(); }
inline Whole broadcast_whole(int32_t x) { return _mm512_set1_epi32(x); }
inline Whole load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Whole low_nibbles(Whole x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Whole high_nibbles(Whole x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
template <int kByte>  // of each lane, from its low end
inline Whole byte(Whole x) {
  return _mm512_and_si512(_mm512_srli_epi32(x, 8 * kByte), _mm512_set1_epi32(255));
}
inline Whole sub_whole(Whole a, Whole b) { return _mm512_sub_epi32(a, b); }
inline Vec to_vec(Whole x) { return _mm512_cvtepi32_ps(x); }
inline Whole to_whole(Vec v) { return _mm512_cvtps_epi32(v); }
inline Whole add_whole(Whole a, Whole b) { return _mm512_add_epi32(a, b); }
template <int kBits>
inline Whole shift_right(Whole x) {
  return _mm512_srai_epi32(x, kBits);
}
template <int kBits>
inline Whole shift_left(Whole x) {
  return _mm512_slli_epi32(x, kBits);
}
// The lanes, each within int8, as bytes.
inline void store_bytes(int8_t* p, Whole x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline Whole broadcast_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return _mm512_set1_epi32(quad);
}
// acc + the four products of unsigned bytes of w and signed bytes of x in each lane.
inline Whole dot_quads(Whole acc, Whole w, Whole x) {
#ifdef DISTINF_HAS_BF16
  return _mm512_dpbusd_epi32(acc, w, x);  // VNNI: every CPU with the bf16 instructions has it
#else
  const Whole even =
      _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const Whole odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
#endif
}
