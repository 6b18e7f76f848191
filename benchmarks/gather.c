// Reads rows in random order and does nothing with them: the rate that no lookup can beat.
#include <stdint.h>

uint64_t gather(const char* table, const int64_t* rows, int64_t count, int64_t row_bytes) {
  uint64_t seen = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + 16 < count) {
      const char* next = table + rows[i + 16] * row_bytes;
      for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(next + b);
    }
    const uint64_t* row = (const uint64_t*)(table + rows[i] * row_bytes);
    for (int64_t word = 0; word < row_bytes / 8; ++word) seen ^= row[word];
  }
  return seen;
}
