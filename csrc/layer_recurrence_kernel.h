// The vector code of layer_recurrence.cpp; see instruction_set.h.

#include "affine_kernel.h"
#include "layer_norm_kernel.h"

// e^x to a few units in the last place: x = n ln 2 + r, the series of e^r, and n into the exponent.
inline Floats exponential(Floats x) {
  const Floats most = Floats{} + 88.0f, least = Floats{} - 87.0f;
  x = x < most ? x : most;
  x = x > least ? x : least;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const Floats shifted = x * 1.44269504088896341f + round, n = shifted - round;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first of them exact
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(p) + (reinterpret_cast<Words>(shifted) << 23));
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

inline Floats tanh(Floats x) {
  const Floats size = x < 0.0f ? -x : x, e = exponential(-2.0f * size), t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

// One GRU cell: `hidden` becomes the new state, from both maps of gates [3D] in the order r, z, n.
inline void gru_cell(const float* gates_x, const float* gates_h, std::int64_t width, float* hidden) {
  for (std::int64_t j = 0; j < width; j += kLanes) {
    const std::int64_t count = width - j;
    const Floats r = sigmoid(load_part(gates_x + j, count) + load_part(gates_h + j, count));
    const Floats z = sigmoid(load_part(gates_x + width + j, count) + load_part(gates_h + width + j, count));
    const Floats n = tanh(load_part(gates_x + 2 * width + j, count) + r * load_part(gates_h + 2 * width + j, count));
    store_part(hidden + j, (1.0f - z) * n + z * load_part(hidden + j, count), count);
  }
}

// Datasets `first` .. `first` + n - 1, all steps. `scratch` has n * (G + 8) * D floats.
void recurrence(const LayerRecurrence& args, std::int64_t first, std::int64_t n, float* scratch) {
  const std::int64_t width = args.width, layers = args.layers;
  float* hidden = scratch;                       // [n, G, D]
  float* pooled = hidden + n * layers * width;   // [n, D]
  float* e = pooled + n * width;                 // [n, D]
  float* gates_x = e + n * width;                // [n, 3D]
  float* gates_h = gates_x + 3 * n * width;      // [n, 3D]
  for (std::int64_t b = 0; b < n; ++b) {
    const float* state = args.state + (first + b) * layers * width;
    for (std::int64_t j = 0; j < width; ++j) {
      float total = 0.0f;
      for (std::int64_t g = 0; g < layers; ++g) {
        total += state[g * width + j];
        hidden[(b * layers + g) * width + j] = state[g * width + j];
      }
      pooled[b * width + j] = total / static_cast<float>(layers);
      e[b * width + j] = args.start[j];
    }
  }
  for (std::int64_t t = 0; t < args.steps; ++t) {
    for (std::int64_t g = 0; g < layers; ++g) {
      const float* x = g == 0 ? e : hidden + (g - 1) * width;
      const std::int64_t x_stride = g == 0 ? width : layers * width, map = 3 * width * width;
      affine(args.weight_ih + g * map, args.bias_ih + g * 3 * width, 3 * width, width, x, x_stride, n, gates_x);
      affine(args.weight_hh + g * map, args.bias_hh + g * 3 * width, 3 * width, width, hidden + g * width,
             layers * width, n, gates_h);
      for (std::int64_t b = 0; b < n; ++b) {
        gru_cell(gates_x + b * 3 * width, gates_h + b * 3 * width, width, hidden + (b * layers + g) * width);
      }
    }
    affine(args.out_weight, args.out_bias, width, width, hidden + (layers - 1) * width, layers * width, n, e);
    for (std::int64_t b = 0; b < n; ++b) {
      float* mixed = gates_x;
      for (std::int64_t j = 0; j < width; ++j) {
        e[b * width + j] = e[b * width + j] > 0.0f ? e[b * width + j] : 0.0f;
        mixed[j] = (1.0f - args.alpha) * e[b * width + j] + args.alpha * pooled[b * width + j];
      }
      layer_norm(mixed, width, args.code_norm_weight + t * width, args.code_norm_bias + t * width,
                 args.codes + ((first + b) * args.steps + t) * width);
      for (std::int64_t g = 0; args.normalise_state && g < layers; ++g) {
        float* state = hidden + (b * layers + g) * width;
        layer_norm(state, width, args.state_norm_weight, args.state_norm_bias, state);
      }
    }
  }
}
