// The vector code of generate_weights.cpp; see instruction_set.h.

#include "affine_kernel.h"
#include "gelu_kernel.h"

constexpr int kParts = kTileRows / kLanes;  // registers in a row of a tile
constexpr int kBlock = kParts == 1 ? 9 : kParts == 2 ? 5 : 3;  // kernel positions in registers at once; 9: a 3x3 kernel

typedef std::uint32_t LooseWords __attribute__((vector_size(4 * PUDNET_LANES), aligned(2), may_alias));
typedef std::uint16_t Halves __attribute__((vector_size(2 * PUDNET_LANES)));
typedef std::uint16_t LooseHalves __attribute__((vector_size(2 * PUDNET_LANES), aligned(2), may_alias));

inline Floats load(const std::uint16_t* from) {
  const Halves halves = *reinterpret_cast<const LooseHalves*>(from);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}
// Rounds to nearest, ties to even, as PyTorch does; a NaN stays one.
inline void store(std::uint16_t* to, Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words kept = reinterpret_cast<Words>(value == value) & rounded;
  const Words nan = reinterpret_cast<Words>(value != value) & 0x7fc0u;
  *reinterpret_cast<LooseHalves*>(to) = __builtin_convertvector(kept | nan, Halves);
}
// Past the caches: half the traffic where nothing reads the result soon, because lines are not fetched to be overwritten.
// Only for whole lines: written in halves, in between loads, they leave the processor half empty, at half the speed.
constexpr bool kStreams = kParts == 1;
inline void stream(float* to, Floats value) {
#if PUDNET_LANES == 16
  _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#else
  store(to, value);
#endif
}
inline void stream(std::uint16_t* to, Floats value) { store(to, value); }

// The features of one layer: [B, K, S]. `first` is that layer's first row of fc_weight; `hidden` is scratch, [B, h, S].
void layer_features(const GenerateWeights& args, std::int64_t layer, std::int64_t first, float* __restrict__ hidden,
                    float* __restrict__ features) {
  const std::int64_t spatial = args.layers[layer].spatial, h = args.hidden, count = h * spatial;
  const std::int64_t code_stride = static_cast<std::int64_t>(args.layers.size()) * args.width;
  affine(args.fc_weight + first * args.width, args.fc_bias + first, count, args.width, args.codes + layer * args.width,
         code_stride, args.batch, hidden);
  gelu_in_place(hidden, args.batch * count);
  for (std::int64_t b = 0; b < args.batch; ++b) {
    for (std::int64_t k = 0; k < 2 * h; ++k) {
      float* feature = features + (b * 2 * h + k) * spatial;
      for (std::int64_t s = 0; s < spatial; ++s) feature[s] = args.mix_bias[layer * 2 * h + k];
      for (std::int64_t c = 0; c < h; ++c) {
        const float weight = args.mix_weight[(layer * 2 * h + k) * h + c];
        const float* from = hidden + b * count + c * spatial;
        for (std::int64_t s = 0; s < spatial; ++s) feature[s] += weight * from[s];
      }
    }
  }
  gelu_in_place(features, args.batch * 2 * h * spatial);
}

// The weights of feature k and, in a bfloat16 tile, of feature k + 1, for kLanes rows: one load for both.
inline void load_features(const float* tile, std::int64_t k, Floats* weights) { weights[0] = load(tile + k * kTileRows); }
inline void load_features(const std::uint16_t* tile, std::int64_t k, Floats* weights) {
  const Words pair = *reinterpret_cast<const LooseWords*>(tile + k * kTileRows);
  weights[0] = reinterpret_cast<Floats>(pair << 16);
  weights[1] = reinterpret_cast<Floats>(pair & 0xffff0000u);
}

// N kernel positions of a tile: bias + sum over k of weight[k] * feature[k][n], handed out as put(n, part, sums). An
// array of sums in its place would go through memory between the last product and the store.
template <int N, typename Weight, typename Store>
inline __attribute__((always_inline)) void block(const Weight* tile, const Weight* bias, const float* feature,
                                                 std::int64_t features, std::int64_t spatial, Store put) {
  constexpr int kStep = sizeof(Weight) == 2 ? 2 : 1;  // features of one load
  Floats sums[N][kParts];
  for (int n = 0; n < N; ++n) {
    for (int part = 0; part < kParts; ++part) sums[n][part] = load(bias + part * kLanes);
  }
  for (std::int64_t k = 0; k < features; k += kStep) {
    Floats weights[kParts][kStep];
    for (int part = 0; part < kParts; ++part) load_features(tile + part * kLanes * kStep, k, weights[part]);
    for (int j = 0; j < kStep && k + j < features; ++j) {
      for (int n = 0; n < N; ++n) {
        for (int part = 0; part < kParts; ++part) sums[n][part] += weights[part][j] * feature[(k + j) * spatial + n];
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int part = 0; part < kParts; ++part) put(n, part, sums[n][part]);
  }
}

enum class Put { kScatter, kStore, kStream };

// Where the 16 rows of a tile go. Unless scattered they are neighbours: row r at position s is to[s * inputs + r].
template <typename Out>
struct Target {
  Out* to;
  std::int64_t inputs, spatial;  // I and S
  Out* layer;                    // for scattered rows
  std::int64_t first_row, count;
};

template <Put kPut, int N, typename Weight, typename Out>
inline __attribute__((always_inline)) void tile_block(const Weight* tile, const Weight* bias, const float* feature,
                                                      std::int64_t features, std::int64_t spatial,
                                                      const Target<Out>& target, std::int64_t s) {
  if (kPut != Put::kScatter) {
    Out* to = target.to + s * target.inputs;
    const std::int64_t inputs = target.inputs;
    const auto put = [=](int n, int part, Floats sums) __attribute__((always_inline)) {
      Out* at = to + n * inputs + part * kLanes;
      kPut == Put::kStream ? stream(at, sums) : store(at, sums);
    };
    block<N>(tile, bias, feature + s, features, spatial, put);
    return;
  }
  Out values[N][kTileRows];
  const auto put = [&](int n, int part, Floats sums) __attribute__((always_inline)) {
    store(values[n] + part * kLanes, sums);
  };
  block<N>(tile, bias, feature + s, features, spatial, put);
  for (int j = 0; j < target.count; ++j) {
    const std::int64_t row = target.first_row + j, o = row / target.inputs, i = row % target.inputs;
    Out* to = target.layer + (o * spatial + s) * target.inputs + i;
    for (int n = 0; n < N; ++n) to[n * target.inputs] = values[n][j];
  }
}

template <Put kPut, typename Weight, typename Out>
inline __attribute__((always_inline)) void all_positions(const Weight* tile, const Weight* bias, const float* feature,
                                                         std::int64_t features, std::int64_t spatial,
                                                         const Target<Out>& target) {
  std::int64_t s = 0;
  for (; s + kBlock <= spatial; s += kBlock) {
    tile_block<kPut, kBlock>(tile, bias, feature, features, spatial, target, s);
  }
#define PUDNET_REST(N)                                                                                \
  case N:                                                                                             \
    if constexpr (N < kBlock) tile_block<kPut, N>(tile, bias, feature, features, spatial, target, s); \
    break;
  switch (spatial - s) {
    PUDNET_REST(1) PUDNET_REST(2) PUDNET_REST(3) PUDNET_REST(4) PUDNET_REST(5) PUDNET_REST(6) PUDNET_REST(7)
    PUDNET_REST(8)
  }
#undef PUDNET_REST
}

template <Put kPut, typename Weight, typename Out>
inline void tile_weights(const Weight* tile, const Weight* bias, const float* feature, std::int64_t features,
                         const Target<Out> target) {
  if (features == 16 && target.spatial == 9) {  // the usual case, with constant sizes
    all_positions<kPut>(tile, bias, feature, 16, 9, target);
  } else {
    all_positions<kPut>(tile, bias, feature, features, target.spatial, target);
  }
}

// A few neighbouring tiles of one layer, for every dataset: the weights are read from memory once and stay in the cache.
template <typename Weight, typename Out>
void tiles_typed(const TileRun& run, std::int64_t batch, std::int64_t features) {
  const std::int64_t upcoming_bytes = kTileRows * features * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t tile_size = (sizeof(Weight) == 2 ? (features + 1) / 2 * 2 : features) * kTileRows;
  const std::int64_t inputs = run.shape.i, spatial = run.shape.spatial, rows = run.shape.o * inputs;
  for (std::int64_t b = 0; b < batch; ++b) {
    const float* feature = run.features + b * features * spatial;
    Out* out = static_cast<Out*>(run.out) + b * run.out_stride;
    const bool aligned = reinterpret_cast<std::uintptr_t>(out) % (sizeof(Out) * kLanes) == 0;
    std::int64_t o = run.first_row / inputs, i = run.first_row % inputs;
    for (std::int64_t t = 0; t < run.tiles; ++t) {
      const Weight* tile = static_cast<const Weight*>(run.weight) + t * tile_size;
      const Weight* bias = static_cast<const Weight*>(run.bias) + t * kTileRows;
      const std::int64_t row = run.first_row + t * kTileRows;
      if (b == 0 && run.upcoming != nullptr) {
        const char* rows_ahead = run.upcoming + t * upcoming_bytes;
        for (std::int64_t at = 0; at < upcoming_bytes; at += 64) __builtin_prefetch(rows_ahead + at, 0, 2);
      }
      const Target<Out> target{out + o * spatial * inputs + i, inputs, spatial, out, row,
                               rows - row < kTileRows ? rows - row : kTileRows};
      if (inputs % kTileRows != 0) {
        tile_weights<Put::kScatter>(tile, bias, feature, features, target);
        continue;
      }
      if (kStreams && run.stream && aligned) {
        tile_weights<Put::kStream>(tile, bias, feature, features, target);
      } else {
        tile_weights<Put::kStore>(tile, bias, feature, features, target);
      }
      i += kTileRows;
      if (i == inputs) {
        i = 0;
        ++o;
      }
    }
  }
}

void tiles(const TileRun& run, std::int64_t batch, std::int64_t features) {
  if (run.bfloat16) {
    run.out_bfloat16 ? tiles_typed<std::uint16_t, std::uint16_t>(run, batch, features)
                     : tiles_typed<std::uint16_t, float>(run, batch, features);
  } else {
    run.out_bfloat16 ? tiles_typed<float, std::uint16_t>(run, batch, features)
                     : tiles_typed<float, float>(run, batch, features);
  }
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// A float32 tile [K][16] from `count` row-major rows, element by element.
void pack_any(const void* rows, bool bfloat16, std::int64_t count, std::int64_t features, float* __restrict__ tile) {
  for (int j = 0; j < kTileRows; ++j) {
    for (std::int64_t k = 0; k < features; ++k) {
      float value = 0.0f;
      if (j < count) {
        value = bfloat16 ? from_bfloat16(static_cast<const std::uint16_t*>(rows)[j * features + k])
                         : static_cast<const float*>(rows)[j * features + k];
      }
      tile[k * kTileRows + j] = value;
    }
  }
}

#if PUDNET_LANES == 16
// Four features of 16 rows, transposed in registers: those of rows j, j + 4, j + 8, j + 12 are put side by side while
// loading, then 4 x 4 blocks turn inside the quarters of the registers. `from` is at the first row.
inline void pack_four(const float* from, std::int64_t stride, float* tile) {
  __m512 rows[4];
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm512_castps128_ps512(_mm_loadu_ps(from + j * stride));
    rows[j] = _mm512_mask_broadcast_f32x4(rows[j], 0x00f0, _mm_loadu_ps(from + (j + 4) * stride));
    rows[j] = _mm512_mask_broadcast_f32x4(rows[j], 0x0f00, _mm_loadu_ps(from + (j + 8) * stride));
    rows[j] = _mm512_mask_broadcast_f32x4(rows[j], 0xf000, _mm_loadu_ps(from + (j + 12) * stride));
  }
  typedef double Doubles __attribute__((vector_size(64)));
#define PUDNET_LOW(a, b) \
  reinterpret_cast<Doubles>(__builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29))
#define PUDNET_HIGH(a, b) \
  reinterpret_cast<Doubles>(__builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
  const Doubles low01 = PUDNET_LOW(rows[0], rows[1]), low23 = PUDNET_LOW(rows[2], rows[3]);
  const Doubles high01 = PUDNET_HIGH(rows[0], rows[1]), high23 = PUDNET_HIGH(rows[2], rows[3]);
#undef PUDNET_LOW
#undef PUDNET_HIGH
  // A quarter now holds rows 4q .. 4q + 3 of one feature: the tile's order.
  store(tile, reinterpret_cast<Floats>(__builtin_shufflevector(low01, low23, 0, 8, 2, 10, 4, 12, 6, 14)));
  store(tile + kTileRows, reinterpret_cast<Floats>(__builtin_shufflevector(low01, low23, 1, 9, 3, 11, 5, 13, 7, 15)));
  store(tile + 2 * kTileRows, reinterpret_cast<Floats>(__builtin_shufflevector(high01, high23, 0, 8, 2, 10, 4, 12, 6, 14)));
  store(tile + 3 * kTileRows, reinterpret_cast<Floats>(__builtin_shufflevector(high01, high23, 1, 9, 3, 11, 5, 13, 7, 15)));
}
#endif

void pack_tile(const void* rows, bool bfloat16, std::int64_t count, std::int64_t features, float* __restrict__ tile) {
  if (bfloat16 || count < kTileRows) return pack_any(rows, bfloat16, count, features, tile);
  const float* from = static_cast<const float*>(rows);
  if (features == 1) {
    std::memcpy(tile, from, kTileRows * sizeof(float));
    return;
  }
#if PUDNET_LANES == 16
  if (features % 4 == 0) {
    for (std::int64_t k = 0; k < features; k += 4) pack_four(from + k, features, tile + k * kTileRows);
    return;
  }
#endif
  pack_any(rows, false, count, features, tile);
}

constexpr Kernels kKernels = {&layer_features, &tiles, &pack_tile};
