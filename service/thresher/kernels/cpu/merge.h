// Bringing equal rows of a batch together: keys in order, so that a run of equal rows is one update.
#pragma once

#include <cstdint>
#include <vector>

namespace thresher {

// Sorts keys by their bits [low, high), stably: a radix sort whose digits are as wide as the first-level cache allows.
inline void radix_sort(std::vector<uint64_t>& keys, std::vector<uint64_t>& spare, int low, int high) {
  constexpr int kMostBits = 11;
  spare.resize(keys.size());
  const int passes = (high - low + kMostBits - 1) / kMostBits;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = low + (high - low) * pass / passes, next = low + (high - low) * (pass + 1) / passes;
    const uint64_t digit = (uint64_t{1} << (next - shift)) - 1;
    uint32_t places[1 << kMostBits] = {};
    for (uint64_t key : keys) ++places[key >> shift & digit];
    uint32_t place = 0;
    for (uint64_t d = 0; d <= digit; ++d) {
      const uint32_t count = places[d];
      places[d] = place;
      place += count;
    }
    for (uint64_t key : keys) spare[places[key >> shift & digit]++] = key;
    keys.swap(spare);
  }
}

// The different rows of sorted keys, and the first key of each with the end behind them; gives their number.
inline int64_t collect_rows(const std::vector<uint64_t>& keys, int shift, std::vector<int64_t>& rows,
                            std::vector<int64_t>& firsts) {
  rows.resize(keys.size() + 1);
  firsts.resize(keys.size() + 1);
  int64_t different = 0;
  uint64_t last = ~uint64_t{0};
  for (size_t i = 0; i < keys.size(); ++i) {  // without a branch: what does not count is written over
    const uint64_t row = keys[i] >> shift;
    rows[different] = static_cast<int64_t>(row);
    firsts[different] = static_cast<int64_t>(i);
    different += row != last;
    last = row;
  }
  firsts[different] = static_cast<int64_t>(keys.size());
  return different;
}

// Number of bits that hold all values below n.
inline int bits_below(uint64_t n) { return n <= 1 ? 0 : 64 - __builtin_clzll(n - 1); }

}  // namespace thresher
