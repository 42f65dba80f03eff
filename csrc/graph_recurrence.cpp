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

struct Kernels {
  void (*graph)(const GraphRecurrence&, float* scratch);
};

#define PUDNET_KERNEL "graph_recurrence_kernel.h"
#include "kernel_copies.h"

}  // namespace

void graph_recurrence_cpu(const GraphRecurrence& args, const std::string& instruction_set) {
  std::vector<float> scratch(args.kinds * args.nodes * args.width + args.hidden + 7 * args.width);
  choose_kernels(instruction_set).graph(args, scratch.data());
}

}  // namespace pudnet
