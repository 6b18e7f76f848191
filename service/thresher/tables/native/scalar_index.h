// How an index is read by instruction sets that have no way of their own.
#pragma once

#include "table.h"

namespace thresher_tables {
namespace {  // of each file for itself, as all that is compiled for several processors

struct ScalarIndex {
  static uint32_t less_equal(const uint32_t* of, uint32_t x) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < 16; ++i) found += of[i] <= x;
    return found;
  }

  static uint64_t list_mask(const Bucket& bucket, const uint8_t* list) { return short_list_mask(bucket, list); }
};

}  // namespace
}  // namespace thresher_tables
