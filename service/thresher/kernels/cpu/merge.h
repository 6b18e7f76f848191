// Bringing equal rows of a batch together, so that a run of equal rows is one update.
//
// Both ways are stable and give the rows in ascending order: where there are many ids for the table's rows, they are
// counted by row; otherwise sorted by the digits of their rows.
#pragma once

#include <cstdint>
#include <vector>

namespace thresher {

// Number of bits that hold all values below n.
inline int bits_below(uint64_t n) { return n <= 1 ? 0 : 64 - __builtin_clzll(n - 1); }

// What a batch has for the different rows of a table.
struct Runs {
  std::vector<int64_t> rows;       // ascending
  std::vector<int64_t> firsts;     // first payload of each row, and the end
  std::vector<uint32_t> payloads;  // of row after row, in the order in which they came
  int64_t different = 0;
  std::vector<uint32_t> places;      // of counting
  std::vector<uint64_t> keys, spare;  // of sorting
};

// Counting costs a look at every row of the table; it pays where there are as many ids.
inline bool should_count(int64_t rows, int64_t ids) { return rows <= ids; }

// Fills runs from pairs of a row below `rows` and a payload. `each_pair` calls its argument with all of them, in the same
// order each time, and gives it back; there are at most `most`.
template <typename EachPair>
void count_rows(const EachPair& each_pair, int64_t rows, int64_t most, Runs& runs) {
  runs.places.assign(rows, 0);
  uint32_t* places = runs.places.data();
  each_pair([places](uint64_t row, uint32_t) { ++places[row]; });
  const int64_t different_most = rows < most ? rows : most;
  runs.rows.resize(different_most + 1);
  runs.firsts.resize(different_most + 2);
  uint32_t place = 0;
  int64_t different = 0;
  for (int64_t row = 0; row < rows; ++row) {  // without a branch: what does not count is written over
    const uint32_t count = places[row];
    runs.rows[different] = row;
    runs.firsts[different] = place;
    places[row] = place;
    place += count;
    different += count > 0;
  }
  runs.firsts[different] = place;
  runs.different = different;
  runs.payloads.resize(place);
  uint32_t* payloads = runs.payloads.data();
  each_pair([places, payloads](uint64_t row, uint32_t payload) { payloads[places[row]++] = payload; });
}

// The same by a radix sort, whose digits are as wide as the first-level cache allows.
template <typename EachPair>
void sort_rows(const EachPair& each_pair, int64_t rows, int64_t most, Runs& runs) {
  constexpr int kMostBits = 11, kShift = 32;
  struct Writer {
    uint64_t* next;
    void operator()(uint64_t row, uint32_t payload) { *next++ = row << kShift | payload; }
  };
  runs.keys.resize(most);
  runs.keys.resize(each_pair(Writer{runs.keys.data()}).next - runs.keys.data());
  runs.spare.resize(runs.keys.size());
  const int bits = bits_below(rows), passes = (bits + kMostBits - 1) / kMostBits;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = kShift + bits * pass / passes, end = kShift + bits * (pass + 1) / passes;
    const uint64_t digit = (uint64_t{1} << (end - shift)) - 1;
    uint32_t places[1 << kMostBits] = {};
    for (uint64_t key : runs.keys) ++places[key >> shift & digit];
    uint32_t place = 0;
    for (uint64_t d = 0; d <= digit; ++d) {
      const uint32_t count = places[d];
      places[d] = place;
      place += count;
    }
    for (uint64_t key : runs.keys) runs.spare[places[key >> shift & digit]++] = key;
    runs.keys.swap(runs.spare);
  }
  const int64_t count = static_cast<int64_t>(runs.keys.size());
  runs.rows.resize(count + 1);
  runs.firsts.resize(count + 2);
  runs.payloads.resize(count);
  int64_t different = 0;
  uint64_t last = ~uint64_t{0};
  for (int64_t i = 0; i < count; ++i) {  // without a branch, as above
    const uint64_t row = runs.keys[i] >> kShift;
    runs.payloads[i] = static_cast<uint32_t>(runs.keys[i]);
    runs.rows[different] = static_cast<int64_t>(row);
    runs.firsts[different] = i;
    different += row != last;
    last = row;
  }
  runs.firsts[different] = count;
  runs.different = different;
}

}  // namespace thresher
