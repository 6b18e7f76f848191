// Where each lane of an expanded vector comes from, for instruction sets that have no expand.
#pragma once

#include <cstdint>

namespace thresher_tables {

// source[bits][lane]: how many bits are set below the lane.
template <uint32_t lanes>
struct Expansion {
  uint8_t source[1 << lanes][lanes];

  constexpr Expansion() : source{} {
    for (uint32_t bits = 0; bits < 1u << lanes; ++bits) {
      uint8_t before = 0;
      for (uint32_t lane = 0; lane < lanes; ++lane) {
        source[bits][lane] = before;
        before = static_cast<uint8_t>(before + (bits >> lane & 1));
      }
    }
  }
};

}  // namespace thresher_tables
