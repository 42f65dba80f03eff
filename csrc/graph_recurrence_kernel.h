// The vector code of graph_recurrence.cpp; see instruction_set.h.

#include "layer_recurrence_kernel.h"

inline void rectify(float* x, std::int64_t count) {
  for (std::int64_t j = 0; j < count; ++j) x[j] = x[j] > 0.0f ? x[j] : 0.0f;
}

// All nodes in order. `scratch` has V * N * D + V * M + 7 * D floats.
void graph(const GraphRecurrence& args, float* scratch) {
  const std::int64_t nodes = args.nodes, width = args.width, hidden = args.hidden;
  float* sent = scratch;                             // [V, N, D] messages of the nodes visited so far
  float* inner = sent + args.kinds * nodes * width;  // [M]
  float* incoming = inner + hidden;                  // [D]
  float* gates_x = incoming + width;                 // [3D]
  float* gates_h = gates_x + 3 * width;              // [3D]
  for (std::int64_t node = 0; node < nodes; ++node) {
    float* state = args.states + node * width;
    for (std::int64_t j = 0; j < width; ++j) incoming[j] = 0.0f;
    for (std::int64_t kind = 0; kind < args.kinds; ++kind) {
      const float* edges = args.edges + (kind * nodes + node) * nodes;
      const float* messages = sent + kind * nodes * width;
      for (std::int64_t source = 0; source < node; ++source) {
        if (edges[source] == 0.0f) continue;
        for (std::int64_t j = 0; j < width; ++j) incoming[j] += edges[source] * messages[source * width + j];
      }
    }
    affine(args.weight_ih, args.bias_ih, 3 * width, width, incoming, width, 1, gates_x);
    affine(args.weight_hh, args.bias_hh, 3 * width, width, state, width, 1, gates_h);
    gru_cell(gates_x, gates_h, width, state);
    for (std::int64_t kind = 0; kind < args.kinds; ++kind) {
      float* out = sent + (kind * nodes + node) * width;
      affine(args.message_in_weight + kind * hidden * width, args.message_in_bias + kind * hidden, hidden, width, state,
             width, 1, inner);
      rectify(inner, hidden);
      affine(args.message_out_weight + kind * width * hidden, args.message_out_bias + kind * width, width, hidden, inner,
             hidden, 1, out);
      rectify(out, width);
    }
  }
}

constexpr Kernels kKernels = {&graph};
