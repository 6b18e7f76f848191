// The kernels for any processor.
#include "kernels.inc"

namespace thresher {
const Kernels& portable_kernels() { return kKernels; }
}  // namespace thresher
