// Opens tables: checks every byte that a lookup relies on.

#include "table.h"

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <new>

namespace thresher_tables {

namespace {

using std::uint64_t;

struct Problem {
  char text[200];
};

[[noreturn]] [[gnu::format(printf, 1, 2)]] void fail(const char* format, ...) {
  Problem problem;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(problem.text, sizeof problem.text, format, arguments);
  va_end(arguments);
  throw problem;
}

using ull = unsigned long long;

bool all_finite(const uint8_t* values, uint64_t count, int32_t dtype) {
  bool bad = false;
  if (dtype == THRESHER_FP32) {
    for (uint64_t i = 0; i < count; ++i) bad |= (~load<uint32_t>(values + 4 * i) & 0x7f800000u) == 0;
  } else if (dtype == THRESHER_FP16) {
    for (uint64_t i = 0; i < count; ++i) bad |= (~load<uint16_t>(values + 2 * i) & 0x7c00u) == 0;
  } else if (dtype == THRESHER_BF16) {
    for (uint64_t i = 0; i < count; ++i) bad |= (~load<uint16_t>(values + 2 * i) & 0x7f80u) == 0;
  }
  return !bad;
}

uint64_t nonzero(const uint8_t* values, uint64_t count, int32_t dtype) {
  uint64_t found = 0;
  if (dtype == THRESHER_FP32) {
    for (uint64_t i = 0; i < count; ++i) found += (load<uint32_t>(values + 4 * i) & 0x7fffffffu) != 0;
  } else if (dtype == THRESHER_FP16 || dtype == THRESHER_BF16) {
    for (uint64_t i = 0; i < count; ++i) found += (load<uint16_t>(values + 2 * i) & 0x7fffu) != 0;
  } else if (dtype == THRESHER_INT8) {
    for (uint64_t i = 0; i < count; ++i) found += values[i] != 0;
  } else {
    for (uint64_t i = 0; i < count; ++i) found += (values[i / 2] >> 4 * (i % 2) & 15) != 8;
  }
  return found;
}

void check_padding(const uint8_t* records, uint64_t bytes) {
  for (uint64_t i = bytes - kPadding; i < bytes; ++i) {
    if (records[i]) fail("records: must end with %d bytes of 0", static_cast<int>(kPadding));
  }
}

void check_scales(const thresher_parts& parts, uint64_t wanted) {
  if (parts.dtype < THRESHER_INT8) wanted = 0;
  if (parts.scale_bytes != wanted * parts.dim * 4) {
    fail("scales: have %llu bytes, must have %llu", ull(parts.scale_bytes), ull(wanted * parts.dim * 4));
  }
  for (uint64_t i = 0; i < parts.scale_bytes / 4; ++i) {
    const float scale = load<float>(static_cast<const uint8_t*>(parts.scales) + 4 * i);
    if (!(scale >= 0 && scale <= 0x1p120f)) fail("scales: must be finite, from 0 to 2^120");
  }
}

const uint8_t* scales_of(const thresher_parts& parts, uint64_t number) {
  if (parts.dtype < THRESHER_INT8) return nullptr;
  return static_cast<const uint8_t*>(parts.scales) + number * parts.dim * 4;
}

// Of the bucket of rows that keep nothing: whatever is read for them, it is multiplied by nothing.
constexpr float kZeros[kMaxDim] = {};

Bucket bucket_of(const thresher_table& table, const uint8_t* records, uint64_t first, uint64_t size, uint32_t kept,
                 Index index, const uint8_t* scales) {
  const uint64_t all = table.dim < 64 ? (uint64_t{1} << table.dim) - 1 : ~uint64_t{0};
  return {records, first, size, kept, index, scales, index.form == Form::kMask ? all : 0,
          index.form == Form::kAll && size ? all : 0};
}

void open_dense(const thresher_parts& parts, thresher_table& table) {
  const uint64_t size = value_bytes(parts.dtype, parts.dim);
  if (parts.record_bytes != parts.rows * size) {
    fail("values: have %llu bytes, must have %llu", ull(parts.record_bytes), ull(parts.rows * size));
  }
  check_scales(parts, 1);
  const auto* values = static_cast<const uint8_t*>(parts.records);
  // Rows looked at together; of int4 one, since half a byte may lie between two.
  const uint64_t step = parts.dtype == THRESHER_INT4 ? 1 : 1024;
  uint64_t kept = 0;
  for (uint64_t row = 0; row < parts.rows; row += step) {
    const uint64_t count = (parts.rows - row < step ? parts.rows - row : step) * parts.dim;
    if (!all_finite(values + row * size, count, parts.dtype)) {
      fail("values: a value near row %llu is not finite", ull(row));
    }
    kept += nonzero(values + row * size, count, parts.dtype);
  }
  if (kept > parts.kept) {
    fail("values: %llu are not 0, but the manifest says that %llu are kept", ull(kept), ull(parts.kept));
  }
  table.buckets.push_back(bucket_of(table, values, 0, size, table.dim, {}, scales_of(parts, 0)));
}

void open_bitmap(const thresher_parts& parts, thresher_table& table) {
  const uint64_t words = (parts.rows + 63) / 64;
  if (parts.index_bytes != words * 8) {
    fail("present: has %llu bytes, %llu rows need %llu", ull(parts.index_bytes), ull(parts.rows), ull(words * 8));
  }
  check_scales(parts, 1);
  table.present = static_cast<const uint8_t*>(parts.index);
  table.ranks.resize(words);
  uint64_t present = 0;
  for (uint64_t word = 0; word < words; ++word) {
    table.ranks[word] = static_cast<uint32_t>(present);
    present += __builtin_popcountll(load<uint64_t>(table.present + 8 * word));
  }
  if (parts.rows % 64 && load<uint64_t>(table.present + 8 * (words - 1)) >> parts.rows % 64) {
    fail("present: bits beyond row %llu are set", ull(parts.rows - 1));
  }
  table.mask_bytes = (table.dim + 7) / 8;
  if (parts.record_bytes < kPadding || present * table.mask_bytes > parts.record_bytes - kPadding) {
    fail("present: has %llu bits set, more masks than the %llu bytes of records hold", ull(present),
         ull(parts.record_bytes));
  }
  table.masks = static_cast<const uint8_t*>(parts.records);
  table.values = table.masks + present * table.mask_bytes;
  const uint64_t size = parts.record_bytes - kPadding - present * table.mask_bytes;
  table.unit = parts.dtype == THRESHER_INT4 ? 1 : kBits[parts.dtype] / 8;
  table.block_starts.resize((present + kBlockRows - 1) / kBlockRows);
  table.distances.resize(present);
  uint64_t kept = 0, end = 0;
  for (uint64_t place = 0; place < present; ++place) {
    const uint8_t* mask = table.masks + place * table.mask_bytes;
    if (table.dim % 8 && mask[table.mask_bytes - 1] >> table.dim % 8) {
      fail("mask: bits beyond column %u are set", table.dim - 1);
    }
    uint32_t count = 0;
    for (uint32_t byte = 0; byte < table.mask_bytes; ++byte) count += __builtin_popcount(mask[byte]);
    if (!count) fail("mask: a row that is present keeps nothing");
    if (place % kBlockRows == 0) table.block_starts[place / kBlockRows] = end;
    table.distances[place] = static_cast<uint16_t>(end - table.block_starts[place / kBlockRows]);
    kept += count;
    end += parts.dtype == THRESHER_INT4 ? (count + 1) / 2 : count;
  }
  if (kept != parts.kept || end * table.unit != size) {
    fail("mask: has %llu bits set for %llu bytes of values, and %llu in the manifest", ull(kept), ull(size),
         ull(parts.kept));
  }
  for (uint64_t first = 0; first < kept; first += 4096) {
    const uint64_t count = kept - first < 4096 ? kept - first : 4096;
    if (!all_finite(table.values + first * table.unit, count, parts.dtype)) {
      fail("values: a value near position %llu is not finite", ull(first));
    }
  }
  check_padding(table.masks, parts.record_bytes);
  const Index mask{Form::kMask, table.mask_bytes, 0, 0};
  table.buckets.push_back(bucket_of(table, table.values, 0, 0, 0, mask, scales_of(parts, 0)));
}

void check_index(const Bucket& bucket, const uint8_t* record, uint32_t dim) {
  const Index& index = bucket.index;
  if (index.form == Form::kMask) {
    if (dim % 8 && record[index.bytes - 1] >> dim % 8) {
      fail("records: bucket of %u: bits beyond column %u are set", bucket.kept, dim - 1);
    }
    uint32_t count = 0;
    for (uint32_t byte = 0; byte < index.bytes; ++byte) count += __builtin_popcount(record[byte]);
    if (count != bucket.kept) fail("records: bucket of %u: a mask does not have %u bits set", bucket.kept, bucket.kept);
  } else if (index.form == Form::kList) {
    const uint32_t bits = bucket.kept * index.low_bits + index.high_bits;
    for (uint32_t bit = bits; bit < 8 * index.bytes; ++bit) {
      if (record[bit / 8] >> bit % 8 & 1) fail("records: bucket of %u: bits after a list are set", bucket.kept);
    }
    uint32_t ones = 0;
    for (uint32_t bit = bits - index.high_bits; bit < bits; ++bit) ones += record[bit / 8] >> bit % 8 & 1;
    uint32_t columns[kMaxDim];
    if (list_columns(bucket, record, columns) != bucket.kept || (index.high_bits && ones != bucket.kept)) {
      fail("records: bucket of %u: a list does not have %u columns", bucket.kept, bucket.kept);
    }
    for (uint32_t i = 0; i < bucket.kept; ++i) {
      if (columns[i] >= dim || (i && columns[i] <= columns[i - 1])) {
        fail("records: bucket of %u: the columns of a list must rise and be below %u", bucket.kept, dim);
      }
    }
  }
}

void open_bucketed(const thresher_parts& parts, thresher_table& table) {
  if (parts.index_bytes != 4 * (parts.dim + 1)) {
    fail("bucket_rows: has %llu bytes, must have %llu", ull(parts.index_bytes), ull(4 * (parts.dim + 1)));
  }
  const auto* counts = static_cast<const uint8_t*>(parts.index);
  uint64_t rows = load<uint32_t>(counts), kept_params = 0, bytes = 0;
  for (uint32_t kept = 1; kept <= table.dim; ++kept) {
    const uint64_t count = load<uint32_t>(counts + 4 * kept);
    if (!count) continue;
    const Index index = index_of(table.dim, kept);
    const uint64_t size = index.bytes + value_bytes(parts.dtype, kept);
    const auto* records = static_cast<const uint8_t*>(parts.records);
    // Where the bucket begins is checked below, before anything is read there.
    const uint8_t* scales = scales_of(parts, table.buckets.size() - 1);
    table.buckets.push_back(bucket_of(table, records, rows, size, kept, index, scales));
    rows += count, kept_params += count * kept, bytes += count * size;
  }
  if (rows != parts.rows) fail("bucket_rows: are %llu rows, the manifest says %llu", ull(rows), ull(parts.rows));
  if (kept_params != parts.kept) {
    fail("bucket_rows: keep %llu parameters, the manifest says %llu", ull(kept_params), ull(parts.kept));
  }
  if (parts.record_bytes != bytes + kPadding) {
    fail("records: have %llu bytes, must have %llu", ull(parts.record_bytes), ull(bytes + kPadding));
  }
  check_scales(parts, table.buckets.size() - 1);
  const auto* begin = static_cast<const uint8_t*>(parts.records);
  for (size_t number = 1; number < table.buckets.size(); ++number) {
    Bucket& bucket = table.buckets[number];
    const uint64_t count = load<uint32_t>(counts + 4 * bucket.kept);
    bucket.records = begin;
    for (uint64_t row = 0; row < count; ++row) {
      const uint8_t* record = begin + row * bucket.size;
      check_index(bucket, record, table.dim);
      if (!all_finite(record + bucket.index.bytes, bucket.kept, parts.dtype)) {
        fail("values: a value near position %llu is not finite", ull(row));
      }
    }
    begin += count * bucket.size;
  }
  check_padding(static_cast<const uint8_t*>(parts.records), parts.record_bytes);
}

void open(const thresher_parts& parts, thresher_table& table) {
  if (parts.layout < THRESHER_DENSE || parts.layout > THRESHER_BUCKETED) fail("layout %d is unknown", parts.layout);
  if (parts.dtype < THRESHER_FP32 || parts.dtype > THRESHER_INT4) fail("dtype %d is unknown", parts.dtype);
  if (!parts.rows || parts.rows > kMaxRows) fail("rows must be 1 to 2^31 - 1, not %llu", ull(parts.rows));
  if (!parts.dim || parts.dim > kMaxDim) fail("dim must be 1 to %u, not %llu", kMaxDim, ull(parts.dim));
  table.layout = parts.layout;
  table.dtype = parts.dtype;
  table.rows = parts.rows;
  table.dim = static_cast<uint32_t>(parts.dim);
  const auto* records = static_cast<const uint8_t*>(parts.records);
  const auto* zeros = parts.dtype < THRESHER_INT8 ? nullptr : reinterpret_cast<const uint8_t*>(kZeros);
  table.buckets.push_back(bucket_of(table, records, 0, 0, 0, {}, zeros));
  if (parts.layout == THRESHER_DENSE) {
    open_dense(parts, table);
  } else if (parts.layout == THRESHER_BITMAP) {
    open_bitmap(parts, table);
  } else {
    open_bucketed(parts, table);
  }
  for (size_t number = 1; number < table.buckets.size(); ++number) {
    table.firsts.push_back(static_cast<uint32_t>(table.buckets[number].first));
  }
  while (table.firsts.size() % 16) table.firsts.push_back(UINT32_MAX);
}

}  // namespace

Index index_of(uint32_t dim, uint32_t kept) {
  if (kept == 0 || kept == dim) return {};
  Index best{Form::kMask, (dim + 7) / 8, 0, 0};
  uint32_t width = 0;
  while ((1u << width) < dim) ++width;
  for (uint32_t low_bits = width; low_bits; --low_bits) {
    const uint32_t groups = (dim + (1u << low_bits) - 1) >> low_bits;
    const uint32_t high_bits = groups > 1 ? kept + groups - 1 : 0;
    const uint32_t bytes = (kept * low_bits + high_bits + 7) / 8;
    if (bytes < best.bytes) best = {Form::kList, bytes, low_bits, high_bits};
  }
  return best;
}

}  // namespace thresher_tables

thresher_table* thresher_table_open(const thresher_parts* parts, char* error, uint64_t error_bytes) {
  const char* problem = "";
  thresher_tables::Problem found;
  try {
    auto table = std::make_unique<thresher_table>();
    thresher_tables::open(*parts, *table);
    return table.release();
  } catch (const thresher_tables::Problem& thrown) {
    found = thrown;
    problem = found.text;
  } catch (const std::bad_alloc&) {
    problem = "not enough memory";
  }
  if (error_bytes) std::snprintf(error, error_bytes, "%s", problem);
  return nullptr;
}

void thresher_table_close(thresher_table* table) { delete table; }
