// The lookups of each instruction set; `thresher_lookup` takes the best that the processor has.
#pragma once

#include "table.h"

namespace thresher_tables {

// What a lookup found wrong first.
struct Bad {
  bool any = false;
  uint64_t bags = 0;
  uint64_t position = 0;
};

using Lookup = void (*)(const thresher_bags* bags, uint64_t count, uint64_t samples, Bad& bad);

Lookup portable_lookup();
#if defined(__x86_64__)
Lookup avx2_lookup();
Lookup avx512_lookup();
#elif defined(__aarch64__)
Lookup neon_lookup();
#endif

}  // namespace thresher_tables
