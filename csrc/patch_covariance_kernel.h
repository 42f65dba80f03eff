// The vector code of patch_covariance.cpp, for registers of PUDNET_LANES floats; see instruction_set.h.

#include "vectors.h"

constexpr int kRows = kLanes == 16 ? 8 : 4;  // channels of one tile of products: 2 * kRows sums stay in registers
constexpr int kColumns = 2;                  // vectors of channels of one tile

// Writes the transpose of a strip of one image into `to`, less `shift`: rows first..first+rows of the padded image, pixels
// one after another, each with its channels.
inline void pack(const PatchCovariance& args, const float* image, const float* shift, std::int64_t first,
                 std::int64_t rows, std::int64_t pixel_step, float* to) {
  const std::int64_t width = args.width + 2 * args.padding;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t y = first + row - args.padding;
    const bool inside = y >= 0 && y < args.height;
    float* const line = to + row * width * pixel_step;
    for (std::int64_t x = 0; x < width; ++x) {
      if (inside && x == args.padding) x += args.width;
      if (x >= width) break;
      for (std::int64_t c = 0; c < args.channels; ++c) line[x * pixel_step + c] = -shift[c];
    }
    if (!inside) continue;
    const float* const from = image + y * args.row_stride;
    float* const pixels = line + args.padding * pixel_step;
    if (args.channel_stride == 1) {
      for (std::int64_t x = 0; x < args.width; ++x) {
        const float* const pixel = from + x * args.column_stride;
        for (std::int64_t c = 0; c < args.channels; ++c) pixels[x * pixel_step + c] = pixel[c] - shift[c];
      }
      continue;
    }
    for (std::int64_t c = 0; c < args.channels; ++c) {
      const float* const plane = from + c * args.channel_stride;
      for (std::int64_t x = 0; x < args.width; ++x) {
        pixels[x * pixel_step + c] = plane[x * args.column_stride] - shift[c];
      }
    }
  }
}

// sums[c] += the pixels of one image, for some channels.
inline void add_pixels(const PatchCovariance& args, const float* image, std::int64_t first, std::int64_t count,
                       double* sums) {
  for (std::int64_t y = 0; y < args.height; ++y) {
    const float* const row = image + y * args.row_stride + first * args.channel_stride;
    if (args.column_stride == 1) {
      for (std::int64_t c = 0; c < count; ++c) {
        const float* const pixels = row + c * args.channel_stride;
        Floats vector{};
        std::int64_t x = 0;
        for (; x + kLanes <= args.width; x += kLanes) vector += load(pixels + x);
        float total = sum(vector);
        for (; x < args.width; ++x) total += pixels[x];
        sums[c] += total;
      }
      continue;
    }
    for (std::int64_t x = 0; x < args.width; ++x) {
      const float* const pixel = row + x * args.column_stride;
      for (std::int64_t c = 0; c < count; ++c) sums[c] += pixel[c * args.channel_stride];
    }
  }
}

// out[r][j] = sum over the region's pixels of a[r] * b[j].
template <int R, int V>
void products(const Region& region, const float* a, const float* b, float* out) {
  Floats sums[R][V] = {};
  for (std::int64_t image = 0; image < region.images; ++image) {
    for (std::int64_t row = 0; row < region.rows; ++row) {
      const std::int64_t at = image * region.image_step + row * region.row_step;
      const float *pixel_a = a + at, *pixel_b = b + at;
      for (std::int64_t x = 0; x < region.columns; ++x) {
        Floats values[V];
        for (int v = 0; v < V; ++v) values[v] = load(pixel_b + v * kLanes);
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < V; ++v) sums[r][v] += pixel_a[r] * values[v];
        }
        pixel_a += region.pixel_step;
        pixel_b += region.pixel_step;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(out + (r * V + v) * kLanes, sums[r][v]);
  }
}

// One row of products is added to all the blocks it belongs to.
inline void add_row(const float* from, std::int64_t count, double* to) {
  for (std::int64_t j = 0; j < count; ++j) to[j] += from[j];
}

template <int R, int V>
void tile(const Region& region, const Cell& cell, std::int64_t row, std::int64_t column, std::int64_t channels) {
  float results[R * V * kLanes];
  products<R, V>(region, region.a + row, region.b + column, results);
  const std::int64_t count = channels - column < V * kLanes ? channels - column : V * kLanes;
  for (double* const block : cell.blocks) {
    for (int r = 0; r < R; ++r) add_row(results + r * V * kLanes, count, block + (row + r) * channels + column);
  }
}

template <int R>
void tiles(const Region& region, const Cell& cell, std::int64_t row, std::int64_t channels) {
  std::int64_t column = 0;
  for (; column + kLanes < channels; column += kColumns * kLanes) {
    tile<R, kColumns>(region, cell, row, column, channels);
  }
  if (column < channels) tile<R, 1>(region, cell, row, column, channels);
}

// Products of the channels row..row+rows (at most kRows) of the region's pixels with all channels of the displaced ones.
inline void cell_products(const Region& region, const Cell& cell, std::int64_t row, std::int64_t rows,
                          std::int64_t channels) {
  switch (rows) {
    case 1: return tiles<1>(region, cell, row, channels);
    case 2: return tiles<2>(region, cell, row, channels);
    case 3: return tiles<3>(region, cell, row, channels);
    case 4: return tiles<4>(region, cell, row, channels);
#if PUDNET_LANES == 16
    case 5: return tiles<5>(region, cell, row, channels);
    case 6: return tiles<6>(region, cell, row, channels);
    case 7: return tiles<7>(region, cell, row, channels);
    case 8: return tiles<8>(region, cell, row, channels);
#endif
  }
}

// sums[o][c] += the region's pixels, for every kernel position o whose patches they are part of.
inline void cell_sums(const Region& region, const Cell& cell, std::int64_t channels) {
  for (std::int64_t column = 0; column < channels; column += kLanes) {
    Floats total{};
    for (std::int64_t image = 0; image < region.images; ++image) {
      for (std::int64_t row = 0; row < region.rows; ++row) {
        const float* const pixels = region.a + column + image * region.image_step + row * region.row_step;
        for (std::int64_t x = 0; x < region.columns; ++x) total += load(pixels + x * region.pixel_step);
      }
    }
    float results[kLanes];
    store(results, total);
    const std::int64_t count = channels - column < kLanes ? channels - column : kLanes;
    for (double* const sums : cell.sums) add_row(results, count, sums + column);
  }
}

constexpr Kernels kKernels = {kRows, pack, add_pixels, cell_products, cell_sums};
