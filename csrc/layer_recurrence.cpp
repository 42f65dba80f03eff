// The recurrence over layers on the CPU. For one dataset PyTorch's time goes into starting some thirty small operations a
// step; here a step is bounded by reading the 0.9 MB of weights (D = 128, G = 2) from the second-level cache.

#include "layer_recurrence.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <vector>

#include "instruction_set.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pudnet {
namespace {

namespace portable {
#define PUDNET_LANES 4
#include "layer_recurrence_kernel.h"
#undef PUDNET_LANES
}  // namespace portable

#ifdef PUDNET_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define PUDNET_LANES 8
#include "layer_recurrence_kernel.h"
#undef PUDNET_LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define PUDNET_LANES 16
#include "layer_recurrence_kernel.h"
#undef PUDNET_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

constexpr std::size_t kCacheLine = 64;
constexpr std::int64_t kGroup = 16;  // datasets worked on together: their states fit the first-level cache

using Recurrence = void (*)(const LayerRecurrence&, std::int64_t first, std::int64_t n, float* scratch);

Recurrence choose(const std::string& name) {
  switch (choose_instruction_set(name)) {
#ifdef PUDNET_X86
    case InstructionSet::kAvx512:
      return avx512::recurrence;
    case InstructionSet::kAvx2:
      return avx2::recurrence;
#endif
    default:
      return portable::recurrence;
  }
}

}  // namespace

void layer_recurrence_cpu(const LayerRecurrence& args, int threads, const std::string& instruction_set) {
  const Recurrence recurrence = choose(instruction_set);
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, args.batch)));
  const std::int64_t floats = (args.layers + 8) * args.width;  // of scratch, for each dataset
  std::vector<float> memory(args.batch * floats + kCacheLine);
  // Vectors that begin on a cache line are loaded twice as fast as others.
  void* aligned = memory.data();
  std::size_t space = memory.size() * sizeof(float);
  float* scratch = static_cast<float*>(std::align(kCacheLine, args.batch * floats * sizeof(float), aligned, space));
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
#ifdef _OPENMP
    const std::int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
#else
    const std::int64_t part = 0, parts = 1;
#endif
    const std::int64_t first = args.batch * part / parts, end = args.batch * (part + 1) / parts;
    for (std::int64_t b = first; b < end; b += kGroup) {
      recurrence(args, b, std::min(kGroup, end - b), scratch + b * floats);
    }
  }
}

}  // namespace pudnet
