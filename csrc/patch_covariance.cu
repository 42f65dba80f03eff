// Covariance of patches on the GPU.
//
// Images are grouped (groups.cuh), and the patches of every group are cut into segments. Stage one: a block owns a tile of
// the covariance and a segment; it reads the values of some patches at a time straight from the images, less the mean
// of their channel, and multiplies. Sums run in float over few patches and in double beyond. Stage two adds the segments
// in order. There are no floating-point atomics, so two runs are equal to the last bit.

#include "device.cuh"
#include "groups.cuh"
#include "patch_covariance.h"

namespace pudnet {
namespace {

constexpr int kTile = 64;           // rows and columns of the covariance a block owns
constexpr int kEdge = 16;           // threads along an edge of the tile: 4 x 4 products for each thread
constexpr int kEach = kTile / kEdge;
constexpr int kDepth = 16;          // patches read at a time
constexpr int kFlush = 16;          // times that before the sums move from float to double
constexpr std::int64_t kTasks = 1024;                       // blocks that fill a GPU
constexpr std::int64_t kWorkspaceElements = 32ll << 20;  // of the second stage, unless one segment needs more
static_assert(kEdge * kEdge == kBlock, "a block is kEdge x kEdge threads");

struct Plan {
  Groups groups;
  std::int64_t patch, tiles, segments;  // tiles along an edge of the covariance; segments of every group
  double* products;                     // [G, segments, P, P]: tiles on and above the diagonal
  double* sums;                         // [G, segments, P]
  float* shift;                         // [G, C]
};

Plan plan(Arena& arena, std::int64_t n, std::int64_t channels, std::int64_t groups, std::int64_t patch) {
  Plan p{};
  p.groups = plan_groups(arena, n, groups);
  p.patch = patch;
  p.tiles = divide_up(patch, kTile);
  const std::int64_t tasks = p.tiles * (p.tiles + 1) / 2 * groups;
  p.segments = divide_up(kTasks, tasks);
  const std::int64_t room = kWorkspaceElements / (patch * patch * groups);
  p.segments = p.segments < room ? p.segments : room > 1 ? room : 1;
  p.products = arena.take<double>(groups * p.segments * patch * patch);
  p.sums = arena.take<double>(groups * p.segments * patch);
  p.shift = arena.take<float>(groups * channels);
  return p;
}

__device__ const float* image_at(const PatchCovariance& args, const Plan& p, std::int64_t at) {
  return args.images + p.groups.order[at] * args.image_stride;
}

// A block adds up one channel of one group. Its mean need not be exact, only near, and the same in every run. Counts are
// those of patches from here on.
__global__ void __launch_bounds__(kBlock) channel_means(PatchCovariance args, Plan p) {
  __shared__ double parts[kBlock];
  const std::int64_t c = blockIdx.x;
  for (std::int64_t g = blockIdx.y; g < args.group_count; g += gridDim.y) {
    const std::int64_t begin = p.groups.start(g), images = p.groups.start(g + 1) - begin;
    const std::int64_t pixels = args.height * args.width, count = images * pixels;
    double sum = 0.0;
    for (std::int64_t i = threadIdx.x; i < count; i += kBlock) {
      const std::int64_t y = i % pixels / args.width, x = i % args.width;
      sum += image_at(args, p, begin + i / pixels)[c * args.channel_stride + y * args.row_stride + x * args.column_stride];
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kBlock / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      p.shift[g * args.channels + c] = count ? static_cast<float>(parts[0] / count) : 0.0f;
      if (c == 0) args.counts[g] = *p.groups.invalid ? -1 : images * args.out_height() * args.out_width();
    }
    __syncthreads();
  }
}

// One row of a tile: a channel and a place in the kernel.
struct Row {
  std::int64_t offset;  // of the channel in an image
  int y, x;             // less the padding
  float shift;
  bool real;            // tiles reach beyond the last row
};

__device__ Row row_at(const PatchCovariance& args, const Plan& p, std::int64_t g, std::int64_t index) {
  const std::int64_t square = args.kernel * args.kernel;
  const std::int64_t c = index / square, o = index % square;
  if (index >= p.patch) return {0, 0, 0, 0.0f, false};
  return {c * args.channel_stride, static_cast<int>(o / args.kernel - args.padding),
          static_cast<int>(o % args.kernel - args.padding), p.shift[g * args.channels + c], true};
}

__device__ float value_at(const PatchCovariance& args, const float* image, const Row& row, int y, int x) {
  if (!row.real || image == nullptr) return 0.0f;
  y += row.y;
  x += row.x;
  const bool inside = y >= 0 && y < args.height && x >= 0 && x < args.width;
  return (inside ? image[row.offset + y * args.row_stride + x * args.column_stride] : 0.0f) - row.shift;
}

__global__ void __launch_bounds__(kBlock) tile_segments(PatchCovariance args, Plan p) {
  __shared__ float left[kDepth][kTile + 1], right[kDepth][kTile + 1];
  std::int64_t row_tile = 0, rest = blockIdx.x;  // the tiles of a triangle, row after row
  while (rest >= p.tiles - row_tile) rest -= p.tiles - row_tile++;
  const std::int64_t first_row = row_tile * kTile, first_column = (row_tile + rest) * kTile;
  const int depth = threadIdx.x % kDepth, lane = threadIdx.x / kDepth;  // of the values this thread reads
  const int tx = threadIdx.x % kEdge, ty = threadIdx.x / kEdge;         // of the products it makes
  const std::int64_t positions = args.out_height() * args.out_width();

  for (std::int64_t task = blockIdx.y; task < args.group_count * p.segments; task += gridDim.y) {
    const std::int64_t g = task / p.segments, segment = task % p.segments;
    const std::int64_t begin = p.groups.start(g), count = (p.groups.start(g + 1) - begin) * positions;
    const std::int64_t share = (count + p.segments - 1) / p.segments, first = segment * share;
    const std::int64_t last = first + share < count ? first + share : count;
    double totals[kEach][kEach] = {};
    double row_total = 0.0;
    std::int64_t at = first;
    while (at < last) {
      float sums[kEach][kEach] = {};
      float row_sum = 0.0f;
      for (int step = 0; step < kFlush && at < last; ++step, at += kDepth) {
        const std::int64_t mine = at + depth;
        const float* const image = mine < last ? image_at(args, p, begin + mine / positions) : nullptr;
        const int y = static_cast<int>(mine % positions / args.out_width());
        const int x = static_cast<int>(mine % positions % args.out_width());
#pragma unroll 1
        for (int i = lane; i < kTile; i += kBlock / kDepth) {
          left[depth][i] = value_at(args, image, row_at(args, p, g, first_row + i), y, x);
          right[depth][i] = value_at(args, image, row_at(args, p, g, first_column + i), y, x);
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          float a[kEach], b[kEach];
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            a[i] = left[d][ty + i * kEdge];
            b[i] = right[d][tx + i * kEdge];
          }
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
#pragma unroll
            for (int j = 0; j < kEach; ++j) sums[i][j] += a[i] * b[j];
          }
          if (threadIdx.x < kTile) row_sum += left[d][threadIdx.x];
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) totals[i][j] += sums[i][j];
      }
      row_total += row_sum;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const std::int64_t row = first_row + ty + i * kEdge, column = first_column + tx + j * kEdge;
        if (row < p.patch && column < p.patch) p.products[(task * p.patch + row) * p.patch + column] = totals[i][j];
      }
    }
    // The sums of rows once, by the blocks on the diagonal.
    if (rest == 0 && threadIdx.x < kTile && first_row + threadIdx.x < p.patch) {
      p.sums[task * p.patch + first_row + threadIdx.x] = row_total;
    }
  }
}

__device__ double add_segments(const Plan& p, const double* parts, std::int64_t step) {
  double total = 0.0;
#pragma unroll 1
  for (std::int64_t s = 0; s < p.segments; ++s) total += parts[s * step];
  return total;
}

__global__ void __launch_bounds__(kBlock) finish_means(PatchCovariance args, Plan p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= p.patch) return;
  const std::int64_t c = row / (args.kernel * args.kernel);
  for (std::int64_t g = blockIdx.y; g < args.group_count; g += gridDim.y) {
    const std::int64_t count = args.counts[g];
    double* const sums = p.sums + g * p.segments * p.patch + row;
    const double mean = count > 0 ? add_segments(p, sums, p.patch) / count : 0.0;
    *sums = mean;  // the covariance needs it without the shift
    args.means[g * p.patch + row] = count < 0 ? nanf("") : static_cast<float>(p.shift[g * args.channels + c] + mean);
  }
}

__global__ void __launch_bounds__(kBlock) finish_covariances(PatchCovariance args, Plan p) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x, row = blockIdx.y;
  if (column >= p.patch) return;
  const bool above = row / kTile <= column / kTile;  // the tiles below the diagonal are the mirror of those above
  const std::int64_t from = above ? row * p.patch + column : column * p.patch + row;
  for (std::int64_t g = blockIdx.z; g < args.group_count; g += gridDim.z) {
    const std::int64_t count = args.counts[g];
    float covariance = count < 0 ? nanf("") : 0.0f;
    if (count > 0) {
      const double* const means = p.sums + g * p.segments * p.patch;
      const double product = add_segments(p, p.products + g * p.segments * p.patch * p.patch + from, p.patch * p.patch);
      covariance = static_cast<float>(product / count - means[row] * means[column]);
      if (row == column && covariance < 0.0f) covariance = 0.0f;  // written so that NaN stays NaN
    }
    args.covariances[(g * p.patch + row) * p.patch + column] = covariance;
  }
}

}  // namespace

std::size_t patch_covariance_workspace(std::int64_t n, std::int64_t channels, std::int64_t groups, std::int64_t patch) {
  Arena arena(nullptr);
  plan(arena, n, channels, groups, patch);
  return arena.size();
}

void patch_covariance_cuda(const PatchCovariance& args, void* workspace, int device, void* stream_handle) {
  const DeviceGuard guard(device);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const std::int64_t patch = args.patch();
  Arena arena(workspace);
  const Plan p = plan(arena, args.n, args.channels, args.group_count, patch);
  group_rows(p.groups, args.groups, args.counts, stream);
  const auto along_y = [](std::int64_t things) { return static_cast<u32>(things < kMaxGridY ? things : kMaxGridY); };
  channel_means<<<dim3(static_cast<u32>(args.channels), along_y(args.group_count)), kBlock, 0, stream>>>(args, p);
  check(cudaGetLastError());
  const dim3 tiles(static_cast<u32>(p.tiles * (p.tiles + 1) / 2), along_y(args.group_count * p.segments));
  tile_segments<<<tiles, kBlock, 0, stream>>>(args, p);
  check(cudaGetLastError());
  finish_means<<<grid(patch, args.group_count), kBlock, 0, stream>>>(args, p);
  check(cudaGetLastError());
  const dim3 rows(static_cast<u32>(divide_up(patch, kBlock)), static_cast<u32>(patch), along_y(args.group_count));
  finish_covariances<<<rows, kBlock, 0, stream>>>(args, p);
  check(cudaGetLastError());
}

}  // namespace pudnet
