// bfloat16 and half-precision storage and scalar conversion. Vector conversions live in vec_*.h.
#pragma once
#include <cstdint>
#include <cstring>

namespace distinf {

struct bf16 {
  uint16_t bits;
};

// IEEE half precision: storage only, for scales that a checkpoint has in it.
struct fp16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// Round to nearest, ties to even; NaN stays NaN (it would round to infinity otherwise).
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace distinf
