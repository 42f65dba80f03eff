// Tiling is bound by writing: 94 MB for ResNet-50. What is large goes past the caches, which saves reading it first.

#include "tile_weights.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace pudnet {
namespace {

constexpr std::int64_t kLarge = 1 << 16;  // floats; a target above it would push everything else out of the caches

// `count` floats, past the caches where both ends allow it.
inline void stream(float* to, const float* from, std::int64_t count) {
#ifdef __SSE2__
  if (reinterpret_cast<std::uintptr_t>(to) % 16 == 0 && count % 4 == 0) {
    for (std::int64_t j = 0; j < count; j += 4) _mm_stream_ps(to + j, _mm_loadu_ps(from + j));
    return;
  }
#endif
  std::memcpy(to, from, count * sizeof(float));
}

void tile_one(const Tile& tile, std::vector<float>& band) {
  const std::int64_t rows = std::min(tile.out, tile.block_out), inputs = std::min(tile.in, tile.block_in);
  const std::int64_t run = inputs * tile.spatial, length = tile.in * tile.spatial;
  band.resize(rows * run);
  for (std::int64_t position = 0; position < tile.spatial; ++position) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* from = tile.block + (position * tile.block_out + row) * tile.block_in;
      float* to = band.data() + row * run + position;
      for (std::int64_t j = 0; j < inputs; ++j) to[j * tile.spatial] = from[j] * tile.scale;
    }
  }
  const bool large = tile.out * length > kLarge;
  for (std::int64_t row = 0; row < tile.out; ++row) {
    const float* from = band.data() + (row % rows) * run;
    float* to = tile.target + row * length;
    for (std::int64_t done = 0; done < length; done += run) {
      const std::int64_t count = std::min(run, length - done);
      if (large) {
        stream(to + done, from, count);
      } else {
        std::memcpy(to + done, from, count * sizeof(float));
      }
    }
  }
}

}  // namespace

void tile_weights_cpu(const Tile* tiles, std::int64_t count) {
  std::vector<float> band;
  for (std::int64_t k = 0; k < count; ++k) tile_one(tiles[k], band);
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace pudnet
