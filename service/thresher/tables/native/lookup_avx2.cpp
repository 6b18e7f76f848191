// Lookups for AVX2 with F16C; the pragma does what compiler flags for this one file would do.
#if defined(__x86_64__)
#pragma GCC target("avx2,f16c,popcnt,bmi")
#include <immintrin.h>

#include "expansion.h"
#include "scalar_index.h"
#include "table.h"

namespace thresher_tables {
namespace {

struct Isa : ScalarIndex {
  static constexpr uint32_t kLanes = 8;
  using Floats = __m256;

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats set(float x) { return _mm256_set1_ps(x); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats read(const void* from) { return _mm256_loadu_ps(static_cast<const float*>(from)); }
  static void write(float* to, Floats v) { _mm256_storeu_ps(to, v); }
  static Floats read_part(const void* from, uint32_t n) {
    alignas(32) float copy[kLanes] = {};
    std::memcpy(copy, from, n * sizeof(float));
    return _mm256_load_ps(copy);
  }
  static void write_part(float* to, Floats v, uint32_t n) {
    alignas(32) float copy[kLanes];
    _mm256_store_ps(copy, v);
    std::memcpy(to, copy, n * sizeof(float));
  }

  static Floats expand(uint32_t bits, Floats v) {
    static constexpr Expansion<8> kExpansion;
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load<int64_t>(kExpansion.source[bits])));
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i there = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each);
    return _mm256_and_ps(_mm256_permutevar8x32_ps(v, lanes), _mm256_castsi256_ps(there));
  }

  template <int32_t dtype>
  static Floats convert(const uint8_t* from) {
    if constexpr (dtype == THRESHER_FP32) return read(from);
    if constexpr (dtype == THRESHER_FP16) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    if constexpr (dtype == THRESHER_BF16) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    if constexpr (dtype == THRESHER_INT8) {
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(from))));
    }
  }

  static Floats halves(uint64_t all) {
    const __m128i pairs = _mm_cvtsi64_si128(static_cast<int64_t>(all)), low = _mm_set1_epi8(15);
    const __m128i each = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_sub_epi8(each, _mm_set1_epi8(8))));
  }
};

}  // namespace
}  // namespace thresher_tables

#include "lookup.inc"

namespace thresher_tables {
Lookup avx2_lookup() { return lookup; }
}  // namespace thresher_tables
#endif
