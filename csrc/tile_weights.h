// Blocks of generated weights, tiled into whole parameters, on the CPU; meaning: pudnet/ops/reference.py.
#pragma once

#include <cstdint>

namespace pudnet {

// One parameter [out, in, spatial] from its block [spatial, block_out, block_in], times a factor.
struct Tile {
  const float* block;
  float* target;
  std::int64_t out, in, spatial, block_out, block_in;
  float scale;
};

void tile_weights_cpu(const Tile* tiles, std::int64_t count);

}  // namespace pudnet
