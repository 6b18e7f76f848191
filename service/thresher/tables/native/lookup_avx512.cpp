// Lookups for AVX-512 with VBMI2; the pragma does what compiler flags for this one file would do.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,f16c,popcnt,bmi,bmi2")
#include <immintrin.h>

#include "table.h"

namespace thresher_tables {
namespace {

struct Isa {
  static constexpr uint32_t kLanes = 16;
  using Floats = __m512;

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats set(float x) { return _mm512_set1_ps(x); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats read(const void* from) { return _mm512_loadu_ps(from); }
  static void write(float* to, Floats v) { _mm512_storeu_ps(to, v); }
  static Floats read_part(const void* from, uint32_t n) { return _mm512_maskz_loadu_ps(first(n), from); }
  static void write_part(float* to, Floats v, uint32_t n) { _mm512_mask_storeu_ps(to, first(n), v); }
  // In a register: the form of vexpandps that reads memory takes twice the time of a load and this.
  static Floats expand(uint32_t bits, Floats v) { return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), v); }

  template <int32_t dtype>
  static Floats convert(const uint8_t* from) {
    if constexpr (dtype == THRESHER_FP32) return _mm512_loadu_ps(from);
    if constexpr (dtype == THRESHER_FP16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    if constexpr (dtype == THRESHER_BF16) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    if constexpr (dtype == THRESHER_INT8) {
      const __m128i wholes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(wholes));
    }
  }

  static Floats halves(uint64_t all) {
    const __m128i pairs = _mm_cvtsi64_si128(static_cast<int64_t>(all)), low = _mm_set1_epi8(15);
    const __m128i each = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(each, _mm_set1_epi8(8))));
  }

  static uint32_t less_equal(const uint32_t* of, uint32_t x) {
    return __builtin_popcount(_mm512_cmple_epu32_mask(_mm512_loadu_si512(of), _mm512_set1_epi32(static_cast<int>(x))));
  }

  // At most 8 bytes hold at most 16 columns below 64: all are taken apart at once.
  static uint64_t list_mask(const Bucket& bucket, const uint8_t* list) {
    const Index& index = bucket.index;
    const uint64_t word = load<uint64_t>(list);
    const __m128i numbers = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Number i times low_bits: no product is above 15 * 6.
    const __m256i wide = _mm256_mullo_epi16(_mm256_cvtepu8_epi16(numbers), _mm256_set1_epi16(static_cast<int16_t>(index.low_bits)));
    const __m128i shifts = _mm256_cvtepi16_epi8(wide);
    const __m128i low_mask = _mm_set1_epi8(static_cast<char>((1u << index.low_bits) - 1));
    __m128i columns = _mm_and_si128(_mm_multishift_epi64_epi8(shifts, _mm_set1_epi64x(static_cast<int64_t>(word))), low_mask);
    if (index.high_bits) {
      // With D below 65 there are at most 32 of these bits.
      const uint64_t high_mask = (uint64_t{1} << index.high_bits) - 1;
      const auto high = static_cast<uint32_t>(word >> bucket.kept * index.low_bits & high_mask);
      const __m256i places = _mm256_maskz_compress_epi8(high, kPlaces());
      const __m128i groups = _mm_sub_epi8(_mm256_castsi256_si128(places), numbers);
      // Where there is no column, bits go astray into the next; none of them is looked at.
      columns = _mm_or_si128(columns, _mm_sll_epi16(groups, _mm_cvtsi32_si128(static_cast<int>(index.low_bits))));
    }
    const __m512i one = _mm512_set1_epi64(1);
    const uint32_t there = (1u << bucket.kept) - 1;
    const __m512i left = _mm512_maskz_sllv_epi64(static_cast<__mmask8>(there), one, _mm512_cvtepu8_epi64(columns));
    const __m512i right = _mm512_maskz_sllv_epi64(static_cast<__mmask8>(there >> 8), one,
                                                  _mm512_cvtepu8_epi64(_mm_unpackhi_epi64(columns, columns)));
    return static_cast<uint64_t>(_mm512_reduce_or_epi64(_mm512_or_si512(left, right)));
  }

 private:
  static __mmask16 first(uint32_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static __m256i kPlaces() {
    return _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
                            27, 28, 29, 30, 31);
  }
};

}  // namespace
}  // namespace thresher_tables

#include "lookup.inc"

namespace thresher_tables {
Lookup avx512_lookup() { return lookup; }
}  // namespace thresher_tables
#endif
