// The recurrence over graph nodes on the CPU. A traversal of ResNet-50 is 126 dependent steps of 17 thousand
// multiplications each: in PyTorch nearly all the time goes into starting operations.

#include "graph_recurrence.h"

#include <cmath>
#include <vector>

#include "instruction_set.h"
#include "layer_recurrence.h"

namespace pudnet {
namespace {

// Both recurrences share the cell; the walk over layers itself is not used here.
#pragma GCC diagnostic ignored "-Wunused-function"

namespace portable {
#define PUDNET_LANES 4
#include "graph_recurrence_kernel.h"
#undef PUDNET_LANES
}  // namespace portable

#ifdef PUDNET_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define PUDNET_LANES 8
#include "graph_recurrence_kernel.h"
#undef PUDNET_LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define PUDNET_LANES 16
#include "graph_recurrence_kernel.h"
#undef PUDNET_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace

void graph_recurrence_cpu(const GraphRecurrence& args, const std::string& instruction_set) {
  std::vector<float> scratch(args.kinds * args.nodes * args.width + args.hidden + 7 * args.width);
  switch (choose_instruction_set(instruction_set)) {
#ifdef PUDNET_X86
    case InstructionSet::kAvx512:
      return avx512::graph(args, scratch.data());
    case InstructionSet::kAvx2:
      return avx2::graph(args, scratch.data());
#endif
    default:
      return portable::graph(args, scratch.data());
  }
}

}  // namespace pudnet
