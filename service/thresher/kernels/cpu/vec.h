// One vector of floats for the instruction set that the including file compiles for: AVX-512, AVX2 or plain C++.
//
// Everything is `static` or in an unnamed namespace: the same names exist once for each instruction set, and the linker
// must not take one for the other. For the same reason no standard template is used here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(THRESHER_AVX512) || defined(THRESHER_AVX2)
#include <immintrin.h>
#endif
#include <math.h>

namespace {

// Storage types. Half and BFloat16 are only ever loaded and stored, never computed with.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float widen(Half x) {
  _Float16 value;
  memcpy(&value, &x, 2);
  return static_cast<float>(value);
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, Half* out) {
  _Float16 value = static_cast<_Float16>(x);
  memcpy(out, &value, 2);
}
inline void narrow(float x, BFloat16* out) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(THRESHER_AVX512)

constexpr int kWidth = 16;
using Vec = __m512;

struct Lanes {  // the first n lanes of a vector
  __mmask16 mask;
  explicit Lanes(int n) : mask(static_cast<__mmask16>((1u << n) - 1)) {}
  bool all() const { return mask == 0xffff; }
};

inline Vec set1(float x) { return _mm512_set1_ps(x); }
// A load cannot take its value from a masked store that is still under way, hence the whole ones.
inline Vec load(const float* p, Lanes n) { return n.all() ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(n.mask, p); }
inline Vec load(const Half* p, Lanes n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(n.mask, p)); }
inline Vec load(const BFloat16* p, Lanes n) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(n.mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline void store(float* p, Vec x, Lanes n) {
  if (n.all()) {
    _mm512_storeu_ps(p, x);
  } else {
    _mm512_mask_storeu_ps(p, n.mask, x);
  }
}
inline void store(Half* p, Vec x, Lanes n) {
  _mm256_mask_storeu_epi16(p, n.mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(BFloat16* p, Vec x, Lanes n) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_mask_storeu_epi16(p, n.mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
// Past the caches, to an aligned place.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
inline void end_of_stream() { _mm_sfence(); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec negate(Vec a) { return _mm512_sub_ps(_mm512_set1_ps(-0.0f), a); }
// x where a > b, else 0.
inline Vec where_greater(Vec a, Vec b, Vec x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x); }
// x times the sign of s, for s != 0.
inline Vec times_sign(Vec x, Vec s) {
  __m512i sign = _mm512_and_si512(_mm512_castps_si512(s), _mm512_set1_epi32(static_cast<int>(0x80000000)));
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), sign));
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_2(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
// Packed values to the lanes whose bit is set, 0 elsewhere. Loading the packed values with a mask and expanding in the
// register is twice as fast as an expanding load.
template <typename T>
inline Vec expand(const T* packed, uint32_t bits) {
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), load(packed, Lanes(__builtin_popcount(bits))));
}
inline void compress(float* out, Vec x, uint32_t bits) {
  store(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), x), Lanes(__builtin_popcount(bits)));
}

#elif defined(THRESHER_AVX2)

constexpr int kWidth = 8;
using Vec = __m256;

struct Lanes {
  int n;
  explicit Lanes(int count) : n(count) {}
  __m256i mask() const {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p, Lanes n) { return n.n == 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, n.mask()); }
inline __m128i load16(const void* p, Lanes n) {
  if (n.n == 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  __m128i bits = _mm_setzero_si128();
  memcpy(&bits, p, 2 * n.n);
  return bits;
}
inline void store16(void* p, __m128i bits, Lanes n) { memcpy(p, &bits, 2 * n.n); }
inline Vec load(const Half* p, Lanes n) { return _mm256_cvtph_ps(load16(p, n)); }
inline Vec load(const BFloat16* p, Lanes n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p, n)), 16));
}
inline void store(float* p, Vec x, Lanes n) {
  if (n.n == 8) {
    _mm256_storeu_ps(p, x);
  } else {
    _mm256_maskstore_ps(p, n.mask(), x);
  }
}
inline void store(Half* p, Vec x, Lanes n) {
  store16(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
inline void store(BFloat16* p, Vec x, Lanes n) {
  float values[8];
  _mm256_storeu_ps(values, x);
  for (int i = 0; i < n.n; ++i) narrow(values[i], p + i);
}
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
inline void end_of_stream() { _mm_sfence(); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec negate(Vec a) { return _mm256_xor_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec where_greater(Vec a, Vec b, Vec x) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), x); }
inline Vec times_sign(Vec x, Vec s) { return _mm256_xor_ps(x, _mm256_and_ps(s, _mm256_set1_ps(-0.0f))); }
inline float sum(Vec a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_2(Vec a, Vec n) {
  __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}

#else

constexpr int kWidth = 8;
struct Vec {
  float x[kWidth];
};

struct Lanes {
  int n;
  explicit Lanes(int count) : n(count) {}
};

#define THRESHER_LANEWISE(expression)                \
  Vec r;                                             \
  for (int i = 0; i < kWidth; ++i) r.x[i] = expression; \
  return r
inline Vec set1(float x) { THRESHER_LANEWISE(x); }
template <typename T>
inline Vec load(const T* p, Lanes n) {
  THRESHER_LANEWISE(i < n.n ? widen(p[i]) : 0.0f);
}
template <typename T>
inline void store(T* p, Vec x, Lanes n) {
  for (int i = 0; i < n.n; ++i) narrow(x.x[i], p + i);
}
inline void stream(float* p, Vec x) { store(p, x, Lanes(kWidth)); }
inline void end_of_stream() {}
inline Vec add(Vec a, Vec b) { THRESHER_LANEWISE(a.x[i] + b.x[i]); }
inline Vec sub(Vec a, Vec b) { THRESHER_LANEWISE(a.x[i] - b.x[i]); }
inline Vec mul(Vec a, Vec b) { THRESHER_LANEWISE(a.x[i] * b.x[i]); }
inline Vec div(Vec a, Vec b) { THRESHER_LANEWISE(a.x[i] / b.x[i]); }
inline Vec fma(Vec a, Vec b, Vec c) { THRESHER_LANEWISE(a.x[i] * b.x[i] + c.x[i]); }
inline Vec sqrt(Vec a) { THRESHER_LANEWISE(::sqrtf(a.x[i])); }
inline Vec min(Vec a, Vec b) { THRESHER_LANEWISE(a.x[i] < b.x[i] ? a.x[i] : b.x[i]); }
inline Vec max(Vec a, Vec b) { THRESHER_LANEWISE(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
inline Vec abs(Vec a) { THRESHER_LANEWISE(::fabsf(a.x[i])); }
inline Vec negate(Vec a) { THRESHER_LANEWISE(-a.x[i]); }
inline Vec where_greater(Vec a, Vec b, Vec x) { THRESHER_LANEWISE(a.x[i] > b.x[i] ? x.x[i] : 0.0f); }
inline Vec times_sign(Vec x, Vec s) { THRESHER_LANEWISE(s.x[i] < 0 ? -x.x[i] : x.x[i]); }
inline float sum(Vec a) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += a.x[i];
  return total;
}
inline Vec round(Vec a) { THRESHER_LANEWISE(::rintf(a.x[i])); }
inline Vec times_power_of_2(Vec a, Vec n) { THRESHER_LANEWISE(::ldexpf(a.x[i], static_cast<int>(n.x[i]))); }
#undef THRESHER_LANEWISE

#endif

#if !defined(THRESHER_AVX512)
template <typename T>
inline Vec expand(const T* packed, uint32_t bits) {
  float lanes[kWidth];
  int taken = 0;
  for (int i = 0; i < kWidth; ++i) lanes[i] = (bits >> i & 1) ? widen(packed[taken++]) : 0.0f;
  return load(lanes, Lanes(kWidth));
}
inline void compress(float* out, Vec x, uint32_t bits) {
  float lanes[kWidth];
  store(lanes, x, Lanes(kWidth));
  for (int i = 0; i < kWidth; ++i) {
    if (bits >> i & 1) *out++ = lanes[i];
  }
}
#endif

// v − clamp(v, −g, g), the soft threshold for g >= 0.
#if defined(THRESHER_AVX512)
inline Vec soft_threshold(Vec v, Vec g) {
  // The smaller magnitude with the sign of v is v clamped, in one instruction.
  return _mm512_sub_ps(v, _mm512_range_ps(v, g, 2));
}
#else
inline Vec soft_threshold(Vec v, Vec g) { return sub(v, min(max(v, negate(g)), g)); }
#endif

// 1 / (1 + e^-x), to 4e-7 of its value; 0 or some 1e-38 far below 0. e^-x = 2^n e^r with |r| <= ln 2 / 2, and for e^r the
// polynomial of degree 5 whose relative error is least (8e-8).
inline Vec sigmoid(Vec x) {
  x = min(negate(x), set1(87.0f));
#if !defined(THRESHER_AVX512)
  x = max(x, set1(-87.0f));  // AVX-512 scales down to 0 by itself
#endif
  const Vec n = round(mul(x, set1(1.44269504f)));
  const Vec r = fma(n, set1(-0.693147182f), x);
  Vec p = fma(set1(0.008291708379f), r, set1(0.04191507784f));
  p = fma(p, r, set1(0.1666766324f));
  p = fma(p, r, set1(0.4999889864f));
  p = fma(p, r, set1(0.999999666f));
  p = fma(p, r, set1(1.000000071f));
  const Vec d = add(set1(1.0f), times_power_of_2(p, n));
#if defined(THRESHER_AVX512)
  const Vec guess = _mm512_rcp14_ps(d);  // and a step of Newton's: half of a division's time
  return mul(guess, _mm512_fnmadd_ps(d, guess, set1(2.0f)));
#else
  return div(set1(1.0f), d);
#endif
}

}  // namespace
