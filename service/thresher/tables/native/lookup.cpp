// The C functions of lookups: what is checked before, and which instructions do it.

#include "lookup.h"

#include <atomic>

namespace {

using thresher_tables::Lookup;

int32_t best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2")) {
    return THRESHER_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi")) {
    return THRESHER_AVX2;
  }
  return THRESHER_PORTABLE;
#elif defined(__aarch64__)
  return THRESHER_NEON;
#else
  return THRESHER_PORTABLE;
#endif
}

std::atomic<int32_t>& in_use() {
  static std::atomic<int32_t> instructions{best()};
  return instructions;
}

Lookup chosen() {
  switch (in_use().load(std::memory_order_relaxed)) {
#if defined(__x86_64__)
    case THRESHER_AVX512:
      return thresher_tables::avx512_lookup();
    case THRESHER_AVX2:
      return thresher_tables::avx2_lookup();
#elif defined(__aarch64__)
    case THRESHER_NEON:
      return thresher_tables::neon_lookup();
#endif
    default:
      return thresher_tables::portable_lookup();
  }
}

bool offsets_fit(const thresher_bags& bags, uint64_t samples) {
  if (bags.offsets[0] != 0 || static_cast<uint64_t>(bags.offsets[samples]) != bags.id_count) return false;
  bool falls = false;
  for (uint64_t sample = 0; sample < samples; ++sample) falls |= bags.offsets[sample + 1] < bags.offsets[sample];
  return !falls;
}

}  // namespace

int32_t thresher_lookup(const thresher_bags* bags, uint64_t count, uint64_t samples, uint64_t* bad_bags,
                        uint64_t* bad_position) {
  for (uint64_t i = 0; i < count; ++i) {
    *bad_bags = i;
    if (!bags[i].table || bags[i].out_stride < bags[i].table->dim) return THRESHER_BAD_ARGUMENT;
    if (bags[i].offsets ? !offsets_fit(bags[i], samples) : bags[i].id_count != samples) return THRESHER_BAD_OFFSETS;
  }
  thresher_tables::Bad bad;
  chosen()(bags, count, samples, bad);
  *bad_bags = bad.bags;
  *bad_position = bad.position;
  return bad.any ? THRESHER_BAD_ID : THRESHER_OK;
}

int32_t thresher_instructions(void) { return in_use().load(); }

int32_t thresher_use(int32_t instructions) {
  const int32_t most = best();
  // NEON is numbered above what x86 has, and each of these has those below it.
  if (instructions == THRESHER_PORTABLE || (instructions <= most && instructions > THRESHER_PORTABLE &&
                                            (most == THRESHER_NEON) == (instructions == THRESHER_NEON))) {
    in_use().store(instructions);
  }
  return in_use().load();
}

int32_t thresher_tables_abi(void) { return THRESHER_TABLES_ABI; }
