// LayerNorm, and rows of any length, for the other X_kernel.h files, after vectors.h; see instruction_set.h.

// The part of a row that fills no register is worked on in a padded copy: same code, no tail loops.
inline Floats load_part(const float* from, std::int64_t count) {
  if (count >= kLanes) return load(from);
  float lanes[kLanes] = {};
  for (std::int64_t j = 0; j < count; ++j) lanes[j] = from[j];
  return load(lanes);
}
inline void store_part(float* to, Floats value, std::int64_t count) {
  if (count >= kLanes) return store(to, value);
  float lanes[kLanes];
  store(lanes, value);
  for (std::int64_t j = 0; j < count; ++j) to[j] = lanes[j];
}

inline void layer_norm(const float* x, std::int64_t width, const float* weight, const float* bias, float* out) {
  Floats total{};
  for (std::int64_t j = 0; j < width; j += kLanes) total += load_part(x + j, width - j);
  const float mean = sum(total) / static_cast<float>(width);
  Floats squares{};
  for (std::int64_t j = 0; j < width; j += kLanes) {
    Floats off = load_part(x + j, width - j) - mean;
    if (width - j < kLanes) {
      for (std::int64_t lane = width - j; lane < kLanes; ++lane) off[lane] = 0.0f;
    }
    squares += off * off;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + 1e-5f);
  for (std::int64_t j = 0; j < width; ++j) out[j] = (x[j] - mean) * scale * weight[j] + bias[j];
}
