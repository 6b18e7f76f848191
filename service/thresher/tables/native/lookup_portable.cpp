// Lookups for any processor.
#include "scalar_index.h"
#include "table.h"

namespace thresher_tables {
namespace {

inline float half_to_float(uint16_t half) {
  // Without the sign, shifted to a float's place: its exponent is then 112 too small, whatever the number.
  const uint32_t shifted = (half & 0x7fffu) << 13;
  const float scaled = load<float>(&shifted) * 0x1p112f;
  const uint32_t bits = load<uint32_t>(&scaled) | (half & 0x8000u) << 16;
  return load<float>(&bits);
}

struct Isa : ScalarIndex {
  static constexpr uint32_t kLanes = 8;
  struct Floats {
    float lane[kLanes];
  };

  static Floats zero() { return {}; }
  static Floats set(float x) {
    Floats found;
    for (float& lane : found.lane) lane = x;
    return found;
  }
  static Floats add(Floats a, Floats b) {
    for (uint32_t i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Floats multiply(Floats a, Floats b) {
    for (uint32_t i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Floats read(const void* from) { return load<Floats>(from); }
  static void write(float* to, Floats v) { std::memcpy(to, v.lane, sizeof v.lane); }
  static Floats read_part(const void* from, uint32_t n) {
    Floats found{};
    std::memcpy(found.lane, from, n * sizeof(float));
    return found;
  }
  static void write_part(float* to, Floats v, uint32_t n) { std::memcpy(to, v.lane, n * sizeof(float)); }

  static Floats expand(uint32_t bits, Floats v) {
    Floats found{};
    for (uint32_t at = 0; bits; bits &= bits - 1) found.lane[__builtin_ctz(bits)] = v.lane[at++];
    return found;
  }

  template <int32_t dtype>
  static Floats convert(const uint8_t* from) {
    Floats found;
    for (uint32_t i = 0; i < kLanes; ++i) {
      if constexpr (dtype == THRESHER_FP32) found.lane[i] = load<float>(from + 4 * i);
      if constexpr (dtype == THRESHER_FP16) found.lane[i] = half_to_float(load<uint16_t>(from + 2 * i));
      if constexpr (dtype == THRESHER_BF16) {
        const uint32_t bits = static_cast<uint32_t>(load<uint16_t>(from + 2 * i)) << 16;
        found.lane[i] = load<float>(&bits);
      }
      if constexpr (dtype == THRESHER_INT8) found.lane[i] = static_cast<float>(load<int8_t>(from + i));
    }
    return found;
  }

  static Floats halves(uint64_t all) {
    Floats found;
    for (uint32_t i = 0; i < kLanes; ++i) found.lane[i] = static_cast<float>(static_cast<int32_t>(all >> 4 * i & 15) - 8);
    return found;
  }
};

}  // namespace
}  // namespace thresher_tables

#include "lookup.inc"

namespace thresher_tables {
Lookup portable_lookup() { return lookup; }
}  // namespace thresher_tables
