// The kernels for AVX2; the pragma does what compiler flags for this one file would do.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#define THRESHER_AVX2
#include "kernels.inc"

namespace thresher {
const Kernels& avx2_kernels() { return kKernels; }
}  // namespace thresher
#endif
