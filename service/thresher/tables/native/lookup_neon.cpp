// Lookups for NEON, which every 64-bit ARM has.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "expansion.h"
#include "scalar_index.h"
#include "table.h"

namespace thresher_tables {
namespace {

struct Isa : ScalarIndex {
  static constexpr uint32_t kLanes = 4;
  using Floats = float32x4_t;

  static Floats zero() { return vdupq_n_f32(0); }
  static Floats set(float x) { return vdupq_n_f32(x); }
  static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats read(const void* from) { return load<Floats>(from); }
  static void write(float* to, Floats v) { vst1q_f32(to, v); }
  static Floats read_part(const void* from, uint32_t n) {
    float copy[kLanes] = {};
    std::memcpy(copy, from, n * sizeof(float));
    return vld1q_f32(copy);
  }
  static void write_part(float* to, Floats v, uint32_t n) {
    float copy[kLanes];
    vst1q_f32(copy, v);
    std::memcpy(to, copy, n * sizeof(float));
  }

  static Floats expand(uint32_t bits, Floats v) {
    static constexpr Expansion<4> kExpansion;
    // Of each lane the four bytes that it comes from.
    const uint32x4_t lanes = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(load<uint32_t>(kExpansion.source[bits])))));
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100u), lanes, 0x04040404u);
    const uint32x4_t each = {1, 2, 4, 8};
    const uint32x4_t there = vtstq_u32(vdupq_n_u32(bits), each);
    const uint8x16_t found = vqtbl1q_u8(vreinterpretq_u8_f32(v), vreinterpretq_u8_u32(bytes));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(found), there));
  }

  template <int32_t dtype>
  static Floats convert(const uint8_t* from) {
    if constexpr (dtype == THRESHER_FP32) return read(from);
    if constexpr (dtype == THRESHER_FP16) return vcvt_f32_f16(vreinterpret_f16_u16(vcreate_u16(load<uint64_t>(from))));
    if constexpr (dtype == THRESHER_BF16) {
      return vreinterpretq_f32_u32(vshll_n_u16(vcreate_u16(load<uint64_t>(from)), 16));
    }
    if constexpr (dtype == THRESHER_INT8) return wholes(vcreate_s8(load<uint32_t>(from)));
  }

  static Floats halves(uint64_t all) {
    const uint8x8_t pairs = vcreate_u8(all);
    const uint8x8_t each = vzip1_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4));
    return wholes(vreinterpret_s8_u8(vsub_u8(each, vdup_n_u8(8))));
  }

 private:
  static Floats wholes(int8x8_t of) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(of)))); }
};

}  // namespace
}  // namespace thresher_tables

#include "lookup.inc"

namespace thresher_tables {
Lookup neon_lookup() { return lookup; }
}  // namespace thresher_tables
#endif
