// The vector code of layer_recurrence.cpp for many datasets: one in each lane, so that nothing is summed across lanes.
// Matrices are [rows][n], n a multiple of kLanes; see instruction_set.h.

#include "layer_recurrence_kernel.h"

// R rows and V vectors of datasets: R * V sums in registers, R + V loads for them.
template <int R, int V>
inline __attribute__((always_inline)) void lanes_block(const float* weight, const float* bias, std::int64_t width,
                                                       const float* x, std::int64_t n, float* __restrict__ out) {
  Floats sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = Floats{} + bias[r];
  }
  for (std::int64_t k = 0; k < width; ++k, x += n) {
    Floats values[V];
    for (int v = 0; v < V; ++v) values[v] = load(x + v * kLanes);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] += weight[r * width + k] * values[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(out + r * n + v * kLanes, sums[r][v]);
  }
}

template <int V>
inline void lanes_rows(const float* weight, const float* bias, std::int64_t rows, std::int64_t width, const float* x,
                       std::int64_t n, float* __restrict__ out) {
  constexpr int kRows = kLanes == 16 ? 8 : 4;  // as many sums as the registers hold
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    lanes_block<kRows, V>(weight + row * width, bias + row, width, x, n, out + row * n);
  }
  for (; row < rows; ++row) lanes_block<1, V>(weight + row * width, bias + row, width, x, n, out + row * n);
}

// out = bias + weight x: [rows][n] from x [width][n].
inline void lanes_affine(const float* weight, const float* bias, std::int64_t rows, std::int64_t width, const float* x,
                         std::int64_t n, float* __restrict__ out) {
  std::int64_t at = 0;
  for (; at + 2 * kLanes <= n; at += 2 * kLanes) lanes_rows<2>(weight, bias, rows, width, x + at, n, out + at);
  if (at < n) lanes_rows<1>(weight, bias, rows, width, x + at, n, out + at);
}

// One GRU cell; gates [3D][n] in the order r, z, n, `hidden` [D][n].
inline void lanes_gru_cell(const float* gates_x, const float* gates_h, std::int64_t size, float* __restrict__ hidden) {
  for (std::int64_t j = 0; j < size; j += kLanes) {
    const Floats r = sigmoid(load(gates_x + j) + load(gates_h + j));
    const Floats z = sigmoid(load(gates_x + size + j) + load(gates_h + size + j));
    const Floats n = tanh(load(gates_x + 2 * size + j) + r * load(gates_h + 2 * size + j));
    store(hidden + j, (1.0f - z) * n + z * load(hidden + j));
  }
}

// Of every column of `x` [D][n], in place.
inline void lanes_layer_norm(float* x, std::int64_t width, std::int64_t n, const float* weight, const float* bias) {
  for (std::int64_t at = 0; at < n; at += kLanes, x += kLanes) {
    Floats mean{}, squares{};
    for (std::int64_t j = 0; j < width; ++j) mean += load(x + j * n);
    mean = mean / static_cast<float>(width);
    for (std::int64_t j = 0; j < width; ++j) {
      const Floats off = load(x + j * n) - mean;
      squares += off * off;
    }
    Floats scale = squares / static_cast<float>(width) + 1e-5f;
    for (int lane = 0; lane < kLanes; ++lane) scale[lane] = 1.0f / std::sqrt(scale[lane]);
    for (std::int64_t j = 0; j < width; ++j) store(x + j * n, (load(x + j * n) - mean) * scale * weight[j] + bias[j]);
  }
}

// Datasets `first` .. `first` + `used` - 1, all steps; the last of these stands in for the lanes that are left over.
// `scratch` has n * (G + 8) * D floats, n being `used` rounded up to a multiple of kLanes.
void recurrence_of_many(const LayerRecurrence& args, std::int64_t first, std::int64_t used, float* scratch) {
  const std::int64_t width = args.width, layers = args.layers, n = (used + kLanes - 1) / kLanes * kLanes;
  const std::int64_t size = width * n;
  float* hidden = scratch;                 // [G][D][n]
  float* pooled = hidden + layers * size;  // [D][n]
  float* e = pooled + size;                // [D][n]
  float* gates_x = e + size;               // [3D][n]
  float* gates_h = gates_x + 3 * size;     // [3D][n]
  for (std::int64_t b = 0; b < n; ++b) {
    const float* state = args.state + (first + (b < used ? b : used - 1)) * layers * width;
    for (std::int64_t j = 0; j < width; ++j) {
      float total = 0.0f;
      for (std::int64_t g = 0; g < layers; ++g) {
        total += state[g * width + j];
        hidden[g * size + j * n + b] = state[g * width + j];
      }
      pooled[j * n + b] = total / static_cast<float>(layers);
    }
  }
  for (std::int64_t t = 0; t < args.steps; ++t) {
    for (std::int64_t g = 0; g < layers; ++g) {
      const float* x = g == 0 ? e : hidden + (g - 1) * size;
      const std::int64_t map = 3 * width * width;
      if (t == 0 && g == 0) {  // all datasets begin with the same code
        affine(args.weight_ih, args.bias_ih, 3 * width, width, args.start, width, 1, gates_h);
        for (std::int64_t j = 0; j < 3 * width; ++j) {
          for (std::int64_t b = 0; b < n; ++b) gates_x[j * n + b] = gates_h[j];
        }
      } else {
        lanes_affine(args.weight_ih + g * map, args.bias_ih + g * 3 * width, 3 * width, width, x, n, gates_x);
      }
      lanes_affine(args.weight_hh + g * map, args.bias_hh + g * 3 * width, 3 * width, width, hidden + g * size, n, gates_h);
      lanes_gru_cell(gates_x, gates_h, size, hidden + g * size);
    }
    lanes_affine(args.out_weight, args.out_bias, width, width, hidden + (layers - 1) * size, n, e);
    float* mixed = gates_x;
    for (std::int64_t j = 0; j < size; ++j) {
      e[j] = e[j] > 0.0f ? e[j] : 0.0f;
      mixed[j] = (1.0f - args.alpha) * e[j] + args.alpha * pooled[j];
    }
    lanes_layer_norm(mixed, width, n, args.code_norm_weight + t * width, args.code_norm_bias + t * width);
    for (std::int64_t b = 0; b < used; ++b) {
      float* code = args.codes + ((first + b) * args.steps + t) * width;
      for (std::int64_t j = 0; j < width; ++j) code[j] = mixed[j * n + b];
    }
    for (std::int64_t g = 0; args.normalise_state && g < layers; ++g) {
      lanes_layer_norm(hidden + g * size, width, n, args.state_norm_weight, args.state_norm_bias);
    }
  }
}

constexpr Kernels kKernels = {&recurrence, &recurrence_of_many};
