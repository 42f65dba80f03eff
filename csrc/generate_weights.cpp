// Weight generation on the CPU.
//
// The weights of a layer are a matrix of its rows (one for every pair of channels) times the features of its kernel
// positions. The rows are read once, in runs of tiles that fit the first-level cache, and the results of 16 rows, which
// are neighbours in the channels-last output, are stored as whole cache lines. So the work is bounded by memory traffic.

#include "generate_weights.h"

#include <algorithm>
#include <vector>

#include "instruction_set.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pudnet {
namespace {

constexpr std::int64_t kRunTiles = 16;             // 16 KiB of weights for K = 16: half of a usual first-level cache
constexpr std::int64_t kStreamBytes = 8ll << 20;  // larger outputs are written past the caches (AVX-512)

// Neighbouring tiles of one layer.
struct TileRun {
  LayerShape shape;
  const void *weight, *bias;  // of its first tile
  bool bfloat16;
  std::int64_t first_row, tiles;
  const float* features;  // [B, K, S] of the layer
  void* out;              // the layer's place in the first dataset's row
  const char* upcoming;  // the rows that will be packed next, or null: fetched meanwhile, so that memory never rests
  std::int64_t out_stride;
  bool out_bfloat16, stream;
};

struct Kernels {
  void (*layer_features)(const GenerateWeights&, std::int64_t layer, std::int64_t first, float* hidden, float* features);
  void (*tiles)(const TileRun&, std::int64_t batch, std::int64_t features);
  void (*pack_tile)(const void* rows, bool bfloat16, std::int64_t count, std::int64_t features, float* tile);
};

inline float from_bfloat16(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline std::uint16_t to_bfloat16(float value) {  // to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#define PUDNET_KERNEL "generate_weights_kernel.h"
#include "kernel_copies.h"

std::int64_t tiles_of(const LayerShape& shape) { return (shape.o * shape.i + kTileRows - 1) / kTileRows; }

// Where a layer's parts begin.
struct Place {
  std::int64_t fc, row, tile, feature, out;
};

// One thread's share: of every layer the same fraction, so that layers of all kinds are spread evenly.
void generate_share(const GenerateWeights& args, const Kernels& kernels, const std::vector<Place>& places,
                    const float* features, std::int64_t size, std::int64_t part, std::int64_t parts, float* scratch) {
  const std::int64_t k = 2 * args.hidden, out_bytes = args.out_bfloat16 ? 2 : 4, row_bytes = args.format.bfloat16 ? 2 : 4;
  const std::int64_t tile_features = args.format.bfloat16 ? (k + 1) / 2 * 2 : k;
  for (std::size_t t = 0; t < args.layers.size(); ++t) {
    const LayerShape& shape = args.layers[t];
    const std::int64_t tiles = tiles_of(shape), runs = (tiles + kRunTiles - 1) / kRunTiles, rows = shape.o * shape.i;
    TileRun run{};
    run.shape = shape;
    run.features = features + places[t].feature;
    run.out = static_cast<char*>(args.out) + places[t].out * out_bytes;
    run.out_stride = size;
    run.out_bfloat16 = args.out_bfloat16;
    run.stream = args.batch * size * out_bytes > kStreamBytes;
    for (std::int64_t r = runs * part / parts; r < runs * (part + 1) / parts; ++r) {
      const std::int64_t first = r * kRunTiles;
      run.tiles = std::min(kRunTiles, tiles - first);
      run.first_row = first * kTileRows;
      if (args.format.packed) {
        const std::int64_t tile = places[t].tile + first;
        run.bfloat16 = args.format.bfloat16;
        run.weight = static_cast<const char*>(args.row_weight) + tile * kTileRows * tile_features * row_bytes;
        run.bias = static_cast<const char*>(args.row_bias) + tile * kTileRows * row_bytes;
      } else {
        float* bias = scratch + kRunTiles * kTileRows * k;
        for (std::int64_t j = 0; j < run.tiles; ++j) {
          const std::int64_t row = run.first_row + j * kTileRows, count = std::min<std::int64_t>(kTileRows, rows - row);
          const std::int64_t at = places[t].row + row;
          const char* weight_rows = static_cast<const char*>(args.row_weight) + at * k * row_bytes;
          const char* bias_rows = static_cast<const char*>(args.row_bias) + at * row_bytes;
          kernels.pack_tile(weight_rows, args.format.bfloat16, count, k, scratch + j * kTileRows * k);
          kernels.pack_tile(bias_rows, args.format.bfloat16, count, 1, bias + j * kTileRows);
        }
        run.bfloat16 = false;
        const std::int64_t ahead = places[t].row + run.first_row + kRunTiles * kTileRows;
        run.upcoming = static_cast<const char*>(args.row_weight) + ahead * k * row_bytes;
        run.weight = scratch;
        run.bias = bias;
      }
      kernels.tiles(run, args.batch, k);
    }
  }
}

}  // namespace

void generate_weights_cpu(const GenerateWeights& args, int threads, const std::string& instruction_set) {
  const Kernels& kernels = choose_kernels(instruction_set);
  const std::int64_t k = 2 * args.hidden, layers = static_cast<std::int64_t>(args.layers.size());
  std::vector<Place> places;
  Place next{};
  std::int64_t most_spatial = 1;
  for (const LayerShape& shape : args.layers) {
    places.push_back(next);
    next.fc += args.hidden * shape.spatial;
    next.row += shape.o * shape.i;
    next.tile += tiles_of(shape);
    next.feature += args.batch * k * shape.spatial;
    next.out += shape.o * shape.i * shape.spatial;
    most_spatial = std::max(most_spatial, shape.spatial);
  }
  threads = std::max(threads, 1);
  // All memory is taken before the parallel region: an exception must not leave one.
  std::vector<float> features(next.feature);
  const std::int64_t hidden_size = args.batch * args.hidden * most_spatial;
  const std::int64_t scratch_size = args.format.packed ? 0 : kRunTiles * kTileRows * (k + 1);
  std::vector<float> hidden(threads * hidden_size), scratch(threads * scratch_size);

#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
#ifdef _OPENMP
    const std::int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
#else
    const std::int64_t part = 0, parts = 1;
#endif
    for (std::int64_t t = part; t < layers; t += parts) {
      kernels.layer_features(args, t, places[t].fc, hidden.data() + part * hidden_size,
                             features.data() + places[t].feature);
    }
#ifdef _OPENMP
#pragma omp barrier
#endif
    generate_share(args, kernels, places, features.data(), next.out, part, parts, scratch.data() + part * scratch_size);
  }
}

void pack_rows_cpu(const float* row_weight, const float* row_bias, std::int64_t features,
                   const std::vector<LayerShape>& layers, bool bfloat16, void* packed_weight, void* packed_bias) {
  std::vector<float> tile(kTileRows * features);
  const std::int64_t tile_features = bfloat16 ? (features + 1) / 2 * 2 : features;
  std::int64_t layer_row = 0, at = 0;
  for (const LayerShape& shape : layers) {
    const std::int64_t rows = shape.o * shape.i;
    for (std::int64_t first = 0; first < rows; first += kTileRows, ++at) {
      const std::int64_t count = std::min<std::int64_t>(kTileRows, rows - first), row = layer_row + first;
      portable::pack_tile(row_weight + row * features, false, count, features, tile.data());
      float bias[kTileRows];
      portable::pack_tile(row_bias + row, false, count, 1, bias);
      if (!bfloat16) {
        std::copy(tile.begin(), tile.end(), static_cast<float*>(packed_weight) + at * kTileRows * features);
        std::copy(bias, bias + kTileRows, static_cast<float*>(packed_bias) + at * kTileRows);
        continue;
      }
      std::uint16_t* weight = static_cast<std::uint16_t*>(packed_weight) + at * kTileRows * tile_features;
      for (std::int64_t k = 0; k < tile_features; ++k) {
        for (int j = 0; j < kTileRows; ++j) {
          weight[(k / 2 * kTileRows + j) * 2 + k % 2] = k < features ? to_bfloat16(tile[k * kTileRows + j]) : 0;
        }
      }
      for (int j = 0; j < kTileRows; ++j) static_cast<std::uint16_t*>(packed_bias)[at * kTileRows + j] = to_bfloat16(bias[j]);
    }
    layer_row += rows;
  }
}

}  // namespace pudnet
