// The kernels for AVX-512 (F, BW, DQ, VL); the pragma does what compiler flags for this one file would do.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi,bmi2")
#define THRESHER_AVX512
#include "kernels.inc"

namespace thresher {
const Kernels& avx512_kernels() { return kKernels; }
}  // namespace thresher
#endif
