// Covariance of patches on the CPU.
//
// The covariance of patches is made of blocks [channels, channels], one for every pair of kernel positions: sums over
// the image of a pixel's channels times those of the pixel a displacement away. Blocks of the same displacement add up
// the same products but for some at the borders. So the products of a displacement are formed once, in cells between the
// borders of all its blocks, and each cell is added to the blocks it belongs to: for 3 x 3, 13 products in place of 45.
//
// Images are taken in chunks that fit the second-level cache, transposed so that the channels of a pixel are neighbours,
// less their means. Sums run in float within a chunk and in double from chunk to chunk. A task owns some rows of all
// blocks of a displacement, and chunks do not depend on the number of threads; so neither does the result.

#include "patch_covariance.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "groups.h"
#include "instruction_set.h"

namespace pudnet {
namespace {

constexpr std::int64_t kChunkBytes = 512 << 10;  // half of a usual second-level cache
constexpr std::int64_t kChunkPixels = 2048;      // bounds the rounding error of sums in float
constexpr std::int64_t kFinish = 16;
constexpr std::int64_t kLineFloats = 16;         // a pixel begins a cache line

// Where the pixels of one cell lie in the chunk.
struct Region {
  const float *a, *b;  // its first pixel, and the same a displacement away
  std::int64_t images, image_step, rows, row_step, columns, pixel_step;
};

// A rectangle of pixels which either all belong to a block or none does.
struct Cell {
  std::int64_t top, bottom, left, right;
  std::vector<double*> blocks;  // each [channels, channels]
  std::vector<double*> sums;    // each [channels]; of displacement 0 only
};

struct Displacement {
  std::int64_t rows, columns;
  std::vector<Cell> cells;
};

struct Kernels {
  int rows;
  void (*pack)(const PatchCovariance&, const float* image, const float* shift, std::int64_t first, std::int64_t rows,
               std::int64_t pixel_step, float* to);
  void (*add_pixels)(const PatchCovariance&, const float* image, std::int64_t first, std::int64_t count, double* sums);
  void (*cell_products)(const Region&, const Cell&, std::int64_t row, std::int64_t rows, std::int64_t channels);
  void (*cell_sums)(const Region&, const Cell&, std::int64_t channels);
};

#define PUDNET_KERNEL "patch_covariance_kernel.h"
#include "kernel_copies.h"

// Along one axis: pixels begin..end-1, and the kernel positions first..last whose patches use all of them.
struct Band {
  std::int64_t begin, end, first, last;
};

// Position o of the kernel meets the pixels o..o+length-1 of the padded image; o runs over first..last.
std::vector<Band> bands_between(std::int64_t first, std::int64_t last, std::int64_t length) {
  std::vector<std::int64_t> borders;
  for (std::int64_t o = first; o <= last; ++o) borders.insert(borders.end(), {o, o + length});
  std::sort(borders.begin(), borders.end());
  borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
  std::vector<Band> bands;
  for (std::size_t i = 0; i + 1 < borders.size(); ++i) {
    const std::int64_t begin = borders[i], end = borders[i + 1];
    bands.push_back({begin, end, std::max(first, end - length), std::min(last, begin)});
  }
  return bands;
}

// The blocks of positions o <= p, in the order of a triangle: their place in `blocks`.
std::int64_t block_of(std::int64_t o, std::int64_t p, std::int64_t positions) {
  return o * positions - o * (o - 1) / 2 + (p - o);
}

// Every displacement from a kernel position to the same or a later one.
std::vector<Displacement> plan(const PatchCovariance& args, double* blocks, double* sums) {
  const std::int64_t k = args.kernel, area = args.channels * args.channels;
  std::vector<Displacement> displacements;
  for (std::int64_t rows = 0; rows < k; ++rows) {
    for (std::int64_t columns = rows == 0 ? 0 : 1 - k; columns < k; ++columns) {
      Displacement displacement{rows, columns, {}};
      const std::int64_t left = std::max<std::int64_t>(0, -columns), right = k - 1 - std::max<std::int64_t>(0, columns);
      for (const Band& y : bands_between(0, k - 1 - rows, args.out_height())) {
        for (const Band& x : bands_between(left, right, args.out_width())) {
          Cell cell{y.begin, y.end, x.begin, x.end, {}, {}};
          for (std::int64_t oy = y.first; oy <= y.last; ++oy) {
            for (std::int64_t ox = x.first; ox <= x.last; ++ox) {
              const std::int64_t from = oy * k + ox, to = (oy + rows) * k + ox + columns;
              cell.blocks.push_back(blocks + block_of(from, to, k * k) * area);
              if (rows == 0 && columns == 0) cell.sums.push_back(sums + from * args.channels);
            }
          }
          displacement.cells.push_back(std::move(cell));
        }
      }
      displacements.push_back(std::move(displacement));
    }
  }
  return displacements;
}

// How images are cut: several whole ones, or a strip of rows of one with the rows that displacements reach below it.
struct Chunks {
  std::int64_t images, strip, packed_rows, width, pixel_step, row_step, image_step;
};

Chunks plan_chunks(const PatchCovariance& args) {
  Chunks c{};
  const std::int64_t height = args.height + 2 * args.padding;
  c.width = args.width + 2 * args.padding;
  c.pixel_step = (args.channels + kLineFloats - 1) / kLineFloats * kLineFloats;
  // Pixels 1 KiB apart would share few lines of the first-level cache.
  if (c.pixel_step % 256 == 0) c.pixel_step += kLineFloats;
  const std::int64_t bytes = c.pixel_step * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t pixels = std::min(kChunkPixels, kChunkBytes / bytes);
  c.strip = std::max<std::int64_t>(1, std::min(height, pixels / c.width));
  c.images = c.strip == height ? std::max<std::int64_t>(1, pixels / (height * c.width)) : 1;
  c.packed_rows = std::min(height, c.strip + args.kernel - 1);
  c.row_step = c.width * c.pixel_step;
  c.image_step = c.packed_rows * c.row_step;
  return c;
}

// The covariance of the channels row.. with the channels column.., up to kFinish of each, at all kernel positions. In such
// squares the blocks that have to be transposed are still read from the cache.
void finish_square(const PatchCovariance& args, std::int64_t row, std::int64_t column, std::int64_t count,
                   const double* blocks, const double* sums, float* covariance) {
  const std::int64_t positions = args.kernel * args.kernel, channels = args.channels;
  const std::int64_t row_end = std::min(row + kFinish, channels), column_end = std::min(column + kFinish, channels);
  const double share = 1.0 / static_cast<double>(count);
  for (std::int64_t o = 0; o < positions; ++o) {
    for (std::int64_t p = 0; p < positions; ++p) {
      const double* const block = blocks + block_of(std::min(o, p), std::max(o, p), positions) * channels * channels;
      const std::int64_t row_step = o <= p ? channels : 1, column_step = o <= p ? 1 : channels;
      for (std::int64_t c = row; c < row_end; ++c) {
        float* const to = covariance + (c * positions + o) * args.patch() + p;
        const double mean = sums[o * channels + c] * share;
        for (std::int64_t j = column; j < column_end; ++j) {
          const double other = sums[p * channels + j] * share;
          to[j * positions] = static_cast<float>(block[c * row_step + j * column_step] * share - mean * other);
        }
      }
    }
  }
}

struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

}  // namespace

void patch_covariance_cpu(const PatchCovariance& args, int threads, const std::string& instruction_set) {
  const Kernels& kernels = choose_kernels(instruction_set);
  const Groups groups = group_rows("patch_covariance", args.groups, args.n, args.group_count);
  const std::int64_t channels = args.channels, positions = args.kernel * args.kernel, patch = args.patch();
  const std::int64_t block_count = positions * (positions + 1) / 2 * channels * channels;
  const std::int64_t height = args.height + 2 * args.padding;
  const Chunks c = plan_chunks(args);
  const std::int64_t scratch = c.images * c.image_step;
  const std::unique_ptr<float[], Free> pixels(new (std::align_val_t{64}) float[scratch]());
  const std::unique_ptr<double[]> blocks(new double[block_count]);
  std::vector<double> sums(patch), totals(channels);
  std::vector<float> shift(channels);
  const std::vector<Displacement> displacements = plan(args, blocks.get(), sums.data());
  const std::int64_t row_tiles = (channels + kernels.rows - 1) / kernels.rows;
  const std::int64_t squares = (channels + kFinish - 1) / kFinish;
  const std::int64_t tasks = static_cast<std::int64_t>(displacements.size()) * row_tiles;

  const auto image = [&](std::int64_t at) { return args.images + groups.order[at] * args.image_stride; };
  const auto region = [&](const Displacement& d, const Cell& cell, std::int64_t first, std::int64_t images) {
    const std::int64_t top = std::max(cell.top, first), bottom = std::min(cell.bottom, first + c.strip);
    const float* const a = pixels.get() + (top - first) * c.row_step + cell.left * c.pixel_step;
    const std::int64_t columns = cell.right - cell.left;
    return Region{a,          a + d.rows * c.row_step + d.columns * c.pixel_step,
                  images,     c.image_step,
                  bottom - top, c.row_step,
                  columns,    c.pixel_step};
  };

  for (std::int64_t g = 0; g < args.group_count; ++g) {
    const std::int64_t begin = groups.start[g], end = groups.start[g + 1];
    const std::int64_t count = (end - begin) * args.out_height() * args.out_width();
    float *means = args.means + g * patch, *covariance = args.covariances + g * patch * patch;
    args.counts[g] = count;
    if (count == 0) {
      std::fill_n(means, patch, 0.0f);
      std::fill_n(covariance, patch * patch, 0.0f);
      continue;
    }
    std::fill_n(blocks.get(), block_count, 0.0);
    std::fill(sums.begin(), sums.end(), 0.0);
    std::fill(totals.begin(), totals.end(), 0.0);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (std::int64_t first = 0; first < channels; first += kLineFloats) {
        const std::int64_t some = std::min(kLineFloats, channels - first);
        for (std::int64_t at = begin; at < end; ++at) kernels.add_pixels(args, image(at), first, some, &totals[first]);
        const double size = static_cast<double>(end - begin) * static_cast<double>(args.height * args.width);
        for (std::int64_t j = first; j < first + some; ++j) shift[j] = static_cast<float>(totals[j] / size);
      }
      for (std::int64_t chunk = begin; chunk < end; chunk += c.images) {
        const std::int64_t images = std::min(c.images, end - chunk);
        for (std::int64_t first = 0; first < height; first += c.strip) {
          const std::int64_t rows = std::min(c.packed_rows, height - first);
#pragma omp for schedule(static)
          for (std::int64_t i = 0; i < images; ++i) {
            kernels.pack(args, image(chunk + i), shift.data(), first, rows, c.pixel_step, pixels.get() + i * c.image_step);
          }
#pragma omp for schedule(dynamic)
          for (std::int64_t task = 0; task < tasks + 1; ++task) {
            const Displacement& d = displacements[task == tasks ? 0 : task / row_tiles];
            const std::int64_t row = task % row_tiles * kernels.rows;
            for (const Cell& cell : d.cells) {
              const Region some = region(d, cell, first, images);
              if (some.rows <= 0) continue;
              if (task == tasks) {
                kernels.cell_sums(some, cell, channels);
              } else {
                kernels.cell_products(some, cell, row, std::min<std::int64_t>(kernels.rows, channels - row), channels);
              }
            }
          }
        }
      }
#pragma omp for schedule(static)
      for (std::int64_t square = 0; square < squares * squares; ++square) {
        finish_square(args, square / squares * kFinish, square % squares * kFinish, count, blocks.get(), sums.data(),
                      covariance);
      }
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < patch; ++i) {
        const std::int64_t channel = i / positions, o = i % positions;
        means[i] = static_cast<float>(shift[channel] + sums[o * channels + channel] / static_cast<double>(count));
        float& variance = covariance[i * patch + i];
        if (variance < 0.0f) variance = 0.0f;  // written so that NaN stays NaN
      }
    }
  }
}

}  // namespace pudnet
