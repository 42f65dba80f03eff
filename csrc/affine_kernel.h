// Affine maps of a few vectors at a time, for the other X_kernel.h files; see instruction_set.h.

#include "vectors.h"

// Four rows and N datasets at a time: sums that do not wait for each other, and fewer loads than products.
template <int N>
inline void affine_block(const float* weight, const float* bias, std::int64_t rows, std::int64_t width, const float* x,
                         std::int64_t x_stride, float* __restrict__ out) {
  Floats sums[N][4];
  for (int b = 0; b < N; ++b) {
    for (int r = 0; r < 4; ++r) sums[b][r] = Floats{};  // one by one: registers, where `= {}` would be a memset
  }
  std::int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    Floats weights[4];
    for (int r = 0; r < 4; ++r) weights[r] = load(weight + r * width + j);
    for (int b = 0; b < N; ++b) {
      const Floats value = load(x + b * x_stride + j);
      for (int r = 0; r < 4; ++r) sums[b][r] += weights[r] * value;
    }
  }
  for (int b = 0; b < N; ++b) {
    float totals[4];
    sum_four(sums[b], totals);
    for (int r = 0; r < 4; ++r) {
      for (std::int64_t rest = j; rest < width; ++rest) totals[r] += weight[r * width + rest] * x[b * x_stride + rest];
      out[b * rows + r] = bias[r] + totals[r];
    }
  }
}

// out[b][row] = bias[row] + weight[row] . x[b], for n datasets.
inline void affine(const float* weight, const float* bias, std::int64_t rows, std::int64_t width, const float* x,
                   std::int64_t x_stride, std::int64_t n, float* __restrict__ out) {
  std::int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const float* from = weight + row * width;
    std::int64_t b = 0;
    for (; b + 4 <= n; b += 4) {
      affine_block<4>(from, bias + row, rows, width, x + b * x_stride, x_stride, out + b * rows + row);
    }
    for (; b < n; ++b) affine_block<1>(from, bias + row, rows, width, x + b * x_stride, x_stride, out + b * rows + row);
  }
  for (; row < rows; ++row) {
    for (std::int64_t b = 0; b < n; ++b) {
      out[b * rows + row] = bias[row] + dot(weight + row * width, x + b * x_stride, width);
    }
  }
}
