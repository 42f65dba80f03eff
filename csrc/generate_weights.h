// Weight generation on the CPU: one code per layer -> all weights of a network, for B datasets in one pass.
//
// Letters as in docs/design.md; K = 2h is the number of features of a generator row, S = kH * kW. Meaning and formulas:
// pudnet/ops/reference.py. All arrays are dense, in the order of their brackets.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pudnet {

constexpr int kTileRows = 16;  // rows of a layer that are worked on together: one register of AVX-512

// How the rows, nearly all of a network's parameters, lie in memory. `bfloat16` is for both weights and biases.
//
// Packed rows come in tiles of 16; a layer begins a new tile, and missing rows are zero. A float32 tile is [K][16]. A
// bfloat16 tile is [(K + 1) / 2][16][2]: two consecutive features side by side, so that one load serves both.
struct RowFormat {
  bool packed;
  bool bfloat16;
};

struct LayerShape {
  std::int64_t o, i, spatial;
};

struct GenerateWeights {
  const float* codes;  // [B, L, D]
  std::int64_t batch, width, hidden;
  std::vector<LayerShape> layers;  // L
  const float* fc_weight;          // [sum over layers of h * S, D]
  const float* fc_bias;            // [the same]
  const float* mix_weight;         // [L, K, h]
  const float* mix_bias;           // [L, K]
  const void* row_weight;          // [R, K], or tiles
  const void* row_bias;            // [R], or [tiles, 16]
  RowFormat format;
  void* out;  // [B, P], each layer [O, S, I]
  bool out_bfloat16;
};

// The result depends on neither `threads` nor on what else is in the batch. `instruction_set` is "avx512", "avx2",
// "portable", or "" for the best one of this machine; throws std::invalid_argument for one it does not have.
void generate_weights_cpu(const GenerateWeights& args, int threads, const std::string& instruction_set);

// Row-major float32 rows -> tiles; weights [tiles][K, rounded up to even for bfloat16][16], biases [tiles, 16].
void pack_rows_cpu(const float* row_weight, const float* row_bias, std::int64_t features,
                   const std::vector<LayerShape>& layers, bool bfloat16, void* packed_weight, void* packed_bias);

}  // namespace pudnet
