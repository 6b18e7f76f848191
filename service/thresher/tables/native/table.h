// An open table: what a lookup needs beside the mapped bytes.
//
// A record is a row's [index][values]; its index says which of the D columns the k values are of (docs/table_format.md).
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "thresher_tables.h"

// Functions here are of each file for itself (`static`): files are compiled for different processors, and the linker would
// take one copy for all.

namespace thresher_tables {

constexpr uint32_t kMaxDim = 1024;
constexpr uint64_t kMaxRows = (1u << 31) - 1;
constexpr uint64_t kPadding = 64;
constexpr uint64_t kBlockRows = 64;  // present rows of a bitmap that share a 64-bit start

enum class Form : uint8_t { kAll, kMask, kList };

struct Index {
  Form form = Form::kAll;
  uint32_t bytes = 0;
  uint32_t low_bits = 0;   // of a list
  uint32_t high_bits = 0;  // of a list; 0 where all columns are one group
};

// The shortest index for `kept` of `dim` columns; of equals the first of mask, and lists by falling low bits.
Index index_of(uint32_t dim, uint32_t kept);

constexpr uint32_t kBits[] = {32, 16, 16, 8, 4};

static inline uint64_t value_bytes(int32_t dtype, uint64_t count) { return (count * kBits[dtype] + 7) / 8; }

// Rows with as many columns: of a bucketed table those of one bucket, of others all.
struct Bucket {
  const uint8_t* records;
  uint64_t first;  // row
  uint64_t size;   // bytes of a record
  uint32_t kept;   // a bitmap's rows differ in it: 0
  Index index;
  const uint8_t* scales;  // float32 [D]; or null
  // For D below 65 the mask of a record that has no list is (its first 8 bytes & and_bits) | or_bits.
  uint64_t and_bits;
  uint64_t or_bits;
};

template <typename T>
static inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The columns of a list, rising if it is well formed; returns how many were found, at most k. Reads up to 7 bytes past it.
static inline uint32_t list_columns(const Bucket& bucket, const uint8_t* list, uint32_t* columns) {
  const Index& index = bucket.index;
  const uint64_t low_mask = (uint64_t{1} << index.low_bits) - 1;
  for (uint32_t i = 0; i < bucket.kept; ++i) {
    const uint32_t bit = i * index.low_bits;
    columns[i] = static_cast<uint32_t>(load<uint64_t>(list + bit / 8) >> bit % 8 & low_mask);
  }
  if (!index.high_bits) return bucket.kept;
  const uint32_t begin = bucket.kept * index.low_bits;
  uint32_t found = 0;
  for (uint32_t done = 0; done < index.high_bits; done += 56) {
    const uint32_t bit = begin + done, left = index.high_bits - done;
    uint64_t ones = load<uint64_t>(list + bit / 8) >> bit % 8 & ((uint64_t{1} << (left < 56 ? left : 56)) - 1);
    for (; ones && found < bucket.kept; ones &= ones - 1, ++found) {
      columns[found] |= (done + static_cast<uint32_t>(__builtin_ctzll(ones)) - found) << index.low_bits;
    }
  }
  return found;
}

// The mask of a list in up to 7 bytes, over up to 64 columns.
static inline uint64_t short_list_mask(const Bucket& bucket, const uint8_t* list) {
  const Index& index = bucket.index;
  const uint64_t word = load<uint64_t>(list), low_mask = (uint64_t{1} << index.low_bits) - 1;
  uint64_t high = index.high_bits ? word >> bucket.kept * index.low_bits : 0, mask = 0;
  for (uint32_t i = 0; i < bucket.kept; ++i) {
    uint64_t column = word >> i * index.low_bits & low_mask;
    if (index.high_bits) {
      column |= (static_cast<uint64_t>(__builtin_ctzll(high)) - i) << index.low_bits;
      high &= high - 1;
    }
    mask |= uint64_t{1} << column;
  }
  return mask;
}

}  // namespace thresher_tables

struct thresher_table {
  int32_t layout;
  int32_t dtype;
  uint64_t rows;
  uint32_t dim;
  // First one for rows that keep nothing, and ids that are none: it reads the same bytes for all, and gives zeros.
  std::vector<thresher_tables::Bucket> buckets;
  std::vector<uint32_t> firsts;  // row of each but that bucket, then largest numbers, a multiple of 16 in all
  // Of a bitmap:
  const uint8_t* present = nullptr;
  const uint8_t* masks = nullptr;
  const uint8_t* values = nullptr;
  uint32_t mask_bytes = 0;
  uint32_t unit = 0;                   // bytes that starts count
  std::vector<uint32_t> ranks;         // rows present before each word of 64
  std::vector<uint64_t> block_starts;  // of the values of each block of present rows
  std::vector<uint16_t> distances;     // of a present row's values from its block's
};
