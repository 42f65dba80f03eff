// Includes PUDNET_KERNEL, the name of an X_kernel.h that ends in a `kKernels` of the includer's type Kernels, once per
// instruction set (instruction_set.h), and defines `choose_kernels`. For one X.cpp each, so without an include guard.

namespace portable {
#define PUDNET_LANES 4
#include PUDNET_KERNEL
#undef PUDNET_LANES
}  // namespace portable

#ifdef PUDNET_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define PUDNET_LANES 8
#include PUDNET_KERNEL
#undef PUDNET_LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define PUDNET_LANES 16
#include PUDNET_KERNEL
#undef PUDNET_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

// Those of the instruction set called `name`, or of the best one for "".
const Kernels& choose_kernels(const std::string& name) {
  switch (choose_instruction_set(name)) {
#ifdef PUDNET_X86
    case InstructionSet::kAvx512:
      return avx512::kKernels;
    case InstructionSet::kAvx2:
      return avx2::kKernels;
#endif
    default:
      return portable::kKernels;
  }
}
