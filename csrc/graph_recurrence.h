// The recurrence over the nodes of graphs on the CPU, forward only. Letters as in docs/design.md; meaning and formulas:
// pudnet/ops/reference.py. All arrays are dense float32, in the order of their brackets.
#pragma once

#include <cstdint>
#include <string>

namespace pudnet {

struct GraphRecurrence {
  std::int64_t nodes, width, kinds, hidden;     // N, D, V, M
  const float* edges;                           // [V, N, N]; every edge leads from an earlier node into a later row
  const float *message_in_weight, *message_in_bias;    // [V, M, D], [V, M]
  const float *message_out_weight, *message_out_bias;  // [V, D, M], [V, D]
  const float *weight_ih, *weight_hh;           // [3D, D]
  const float *bias_ih, *bias_hh;               // [3D]
  float* states;                                // [N, D], updated in place
};

// One thread: a node waits for its predecessors, and real networks are nearly chains. `instruction_set` as in
// instruction_set.h.
void graph_recurrence_cpu(const GraphRecurrence& args, const std::string& instruction_set);

}  // namespace pudnet
