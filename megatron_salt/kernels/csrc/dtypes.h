// bf16, fp16 and fp32 as they lie in memory, and their conversions: to nearest, ties to even, on
// every machine. Plain bits, so that no compiler's own half type is needed.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SALT_FN __device__ __forceinline__
#else
#define SALT_FN inline __attribute__((always_inline))
#endif

namespace salt {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Numbers of the dtypes in the interface, see kd_loss.h.
enum DtypeCode : int32_t { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

SALT_FN float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SALT_FN uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SALT_FN float to_float(float x) { return x; }
SALT_FN float to_float(Bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
SALT_FN void from_float(float x, float& out) { out = x; }

#if defined(__CUDACC__)

SALT_FN float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
SALT_FN void from_float(float x, Bf16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
SALT_FN void from_float(float x, Fp16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }

#else

SALT_FN float to_float(Fp16 x) {
  // Shifted into place, exponent and mantissa read as a float 2^112 times too small.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const float value = from_bits(magnitude) * from_bits(0x77800000u);  // 2^112
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and nan
  return from_bits(to_bits(value) | special | uint32_t(x.bits & 0x8000u) << 16);
}

SALT_FN void from_float(float x, Bf16& out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

SALT_FN void from_float(float x, Fp16& out) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal numbers: round to 10 bits of mantissa, then move the exponent from bias 127 to 15.
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  // Below 2^-14: adding 0.5 lets the adder do the rounding; 2^-24 is the last bit of the sum.
  const uint32_t tiny = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more round to inf
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = uint16_t(half | sign);
}

#endif

}  // namespace salt
