// The recurrence over the layers of a network on the CPU, forward only. Letters as in docs/design.md; meaning and
// formulas: pudnet/ops/reference.py. All arrays are dense float32, in the order of their brackets.
#pragma once

#include <cstdint>
#include <string>

namespace pudnet {

struct LayerRecurrence {
  std::int64_t batch, layers, width, steps;       // B, G, D, L
  const float* state;                             // [B, G, D]
  const float* start;                             // [D]
  const float *weight_ih, *weight_hh;             // [G, 3D, D]
  const float *bias_ih, *bias_hh;                 // [G, 3D]
  const float *out_weight, *out_bias;             // [D, D], [D]
  const float *state_norm_weight, *state_norm_bias;  // [D]
  const float *code_norm_weight, *code_norm_bias;    // [L, D]
  float alpha;
  bool normalise_state;
  float* codes;  // [B, L, D]
};

// Threads share the datasets out among themselves. The result of a dataset depends neither on `threads` nor on the others,
// but batches of 12 and more sum in another order than smaller ones.
// `instruction_set` as in instruction_set.h.
void layer_recurrence_cpu(const LayerRecurrence& args, int threads, const std::string& instruction_set);

}  // namespace pudnet
