// The recurrence over layers on the CPU. For one dataset PyTorch's time goes into starting some thirty small operations a
// step; here a step is bounded by reading the 0.9 MB of weights (D = 128, G = 2) from the second-level cache. Many
// datasets have a vector lane each, and are bounded by arithmetic.

#include "layer_recurrence.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>

#include "instruction_set.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pudnet {
namespace {

// All steps of datasets `first` .. `first` + `n` - 1.
using Recurrence = void (*)(const LayerRecurrence&, std::int64_t first, std::int64_t n, float* scratch);

struct Kernels {
  Recurrence few, many;
};

#define PUDNET_KERNEL "layer_recurrence_batch_kernel.h"
#include "kernel_copies.h"

constexpr std::size_t kCacheLine = 64;
constexpr std::int64_t kGroup = 32;  // datasets worked on together: each of their matrices fits the first-level cache
constexpr std::int64_t kMany = 12;   // datasets from which on lanes, some of them idle, are faster than one by one

}  // namespace

void layer_recurrence_cpu(const LayerRecurrence& args, int threads, const std::string& instruction_set) {
  const bool many = args.batch >= kMany;
  const Kernels& kernels = choose_kernels(instruction_set);
  const Recurrence recurrence = many ? kernels.many : kernels.few;
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, args.batch)));
  const std::int64_t floats = (many ? kGroup : args.batch) * (args.layers + 8) * args.width;  // of scratch, for a thread
  const std::size_t used = threads * floats * sizeof(float);
  std::size_t space = used + kCacheLine;
  const std::unique_ptr<char[]> memory(new char[space]);  // not filled with zeros, which would take longer than a step
  // Vectors that begin on a cache line are loaded twice as fast as others.
  void* aligned = memory.get();
  float* scratch = static_cast<float*>(std::align(kCacheLine, used, aligned, space));
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
      recurrence(args, b, std::min(kGroup, end - b), scratch + part * floats);
    }
  }
}

}  // namespace pudnet
