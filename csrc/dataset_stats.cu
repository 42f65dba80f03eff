// Dataset statistics on the GPU.
//
// As on the CPU, row indices are first grouped by class, and each class is cut into segments of rows (groups.cuh). Stage
// one: a block owns a segment and 256 columns, and writes their sums. Stage two: a thread owns a class and a column, and
// adds the segments' sums in order. There are no floating-point atomics, so two runs are equal to the last bit; the only
// atomics add integers, where order does not matter.

#include "dataset_stats.h"
#include "device.cuh"
#include "groups.cuh"

namespace pudnet {
namespace {

__global__ void __launch_bounds__(kBlock) image_segments(ImageStats args, Groups g, u32* sums, u32* squares) {
  const std::int64_t columns = args.pixels * args.channels;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (column >= columns) return;
  const std::int64_t pixel = column / args.channels, channel = column % args.channels;
  const float scale = args.scale[channel], shift = args.shift[channel];
  float* const plane = args.sketch + channel * args.pixels + pixel;
  const std::int64_t segments = g.first_segment[g.classes + 1];
  for (std::int64_t index = blockIdx.y; index < segments; index += gridDim.y) {
    const Segment segment = segment_at(g, index);
    u32 sum = 0, square = 0;
#pragma unroll 8
    for (std::int64_t at = segment.begin; at < segment.end; ++at) {
      const std::int64_t row = g.order[at] * columns;
      const u32 value = args.images[row + column];
      sum += value;
      square += value * value;
      plane[row] = static_cast<float>(value) * scale + shift;
    }
    sums[index * columns + column] = sum;
    squares[index * columns + column] = square;
  }
}

__global__ void __launch_bounds__(kBlock) image_classes(ImageStats args, Groups g, const u32* sums, const u32* squares,
                                                        u64* channel_totals) {
  __shared__ u64 totals[2 * kMaxChannels];
  if (threadIdx.x < 2 * kMaxChannels) totals[threadIdx.x] = 0;
  __syncthreads();
  const std::int64_t columns = args.pixels * args.channels;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const bool invalid = *g.invalid != 0;
  if (column < columns) {
    u64 channel_sum = 0, channel_square = 0;
    for (std::int64_t k = blockIdx.y; k <= g.classes; k += gridDim.y) {
      u64 sum = 0, square = 0;
      for (std::int64_t s = g.first_segment[k]; s < g.first_segment[k + 1]; ++s) {
        sum += sums[s * columns + column];
        square += squares[s * columns + column];
      }
      channel_sum += sum;
      channel_square += square;
      if (k == g.classes) continue;
      float mean, variance;
      moments_of_bytes(g.start(k + 1) - g.start(k), sum, square, &mean, &variance);
      args.means[k * columns + column] = invalid ? nanf("") : mean;
      args.variances[k * columns + column] = invalid ? nanf("") : variance;
    }
    atomicAdd(&totals[column % args.channels], channel_sum);
    atomicAdd(&totals[kMaxChannels + column % args.channels], channel_square);
  }
  __syncthreads();
  if (threadIdx.x < 2 * kMaxChannels) atomicAdd(&channel_totals[threadIdx.x], totals[threadIdx.x]);
}

__global__ void image_channels(ImageStats args, const u64* channel_totals) {
  const int c = threadIdx.x;
  moments_of_bytes(args.n * args.pixels, channel_totals[c], channel_totals[kMaxChannels + c], args.channel_mean + c,
                   args.channel_var + c);
}

__global__ void __launch_bounds__(kBlock) feature_segments(ClassStats args, Groups g, double* sums, double* squares) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (column >= args.width) return;
  const std::int64_t segments = g.first_segment[g.classes];  // those of the unlabelled rows come after
  for (std::int64_t index = blockIdx.y; index < segments; index += gridDim.y) {
    const Segment segment = segment_at(g, index);
    const double shift = args.features[g.order[g.start(segment.k)] * args.row_stride + column];
    double sum = 0.0, square = 0.0;
#pragma unroll 4
    for (std::int64_t at = segment.begin; at < segment.end; ++at) {
      const double deviation = args.features[g.order[at] * args.row_stride + column] - shift;
      sum += deviation;
      square += deviation * deviation;
    }
    sums[index * args.width + column] = sum;
    squares[index * args.width + column] = square;
  }
}

__global__ void __launch_bounds__(kBlock) feature_classes(ClassStats args, Groups g, const double* sums,
                                                          const double* squares) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (column >= args.width) return;
  const bool invalid = *g.invalid != 0;
  for (std::int64_t k = blockIdx.y; k < g.classes; k += gridDim.y) {
    const std::int64_t rows = g.start(k + 1) - g.start(k);
    float mean = 0.0f, variance = 0.0f;
    if (rows > 0) {
      double sum = 0.0, square = 0.0;
#pragma unroll 1  // unrolled, it spills a register on sm_90
      for (std::int64_t s = g.first_segment[k]; s < g.first_segment[k + 1]; ++s) {
        sum += sums[s * args.width + column];
        square += squares[s * args.width + column];
      }
      const double shift = args.features[g.order[g.start(k)] * args.row_stride + column];
      moments_of_deviations(rows, shift, sum, square, &mean, &variance);
    }
    args.means[k * args.width + column] = invalid ? nanf("") : mean;
    args.variances[k * args.width + column] = invalid ? nanf("") : variance;
  }
}

struct ImageWorkspace {
  Groups groups;
  u64* channel_totals;  // [2, kMaxChannels]
  u32 *sums, *squares;  // [max_segments, columns]
};

ImageWorkspace plan_images(Arena& arena, std::int64_t n, std::int64_t columns, std::int64_t classes) {
  ImageWorkspace w{plan_groups(arena, n, classes), nullptr, nullptr, nullptr};
  w.channel_totals = arena.take<u64>(2 * kMaxChannels);
  w.sums = arena.take<u32>(w.groups.max_segments * columns);
  w.squares = arena.take<u32>(w.groups.max_segments * columns);
  return w;
}

struct FeatureWorkspace {
  Groups groups;
  double *sums, *squares;  // [max_segments, F]
};

FeatureWorkspace plan_features(Arena& arena, std::int64_t n, std::int64_t width, std::int64_t classes) {
  FeatureWorkspace w{plan_groups(arena, n, classes), nullptr, nullptr};
  w.sums = arena.take<double>(w.groups.max_segments * width);
  w.squares = arena.take<double>(w.groups.max_segments * width);
  return w;
}

}  // namespace

std::size_t image_stats_workspace(std::int64_t n, std::int64_t columns, std::int64_t classes) {
  Arena arena(nullptr);
  plan_images(arena, n, columns, classes);
  return arena.size();
}

std::size_t class_stats_workspace(std::int64_t n, std::int64_t width, std::int64_t classes) {
  Arena arena(nullptr);
  plan_features(arena, n, width, classes);
  return arena.size();
}

void image_stats_cuda(const ImageStats& args, void* workspace, int device, void* stream_handle) {
  const DeviceGuard guard(device);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const std::int64_t columns = args.pixels * args.channels;
  Arena arena(workspace);
  const ImageWorkspace w = plan_images(arena, args.n, columns, args.classes);
  group_rows(w.groups, args.labels, args.counts, stream);
  check(cudaMemsetAsync(w.channel_totals, 0, 2 * kMaxChannels * sizeof(u64), stream));
  image_segments<<<grid(columns, w.groups.max_segments), kBlock, 0, stream>>>(args, w.groups, w.sums, w.squares);
  check(cudaGetLastError());
  image_classes<<<grid(columns, args.classes + 1), kBlock, 0, stream>>>(args, w.groups, w.sums, w.squares,
                                                                        w.channel_totals);
  check(cudaGetLastError());
  image_channels<<<1, static_cast<u32>(args.channels), 0, stream>>>(args, w.channel_totals);
  check(cudaGetLastError());
}

void class_stats_cuda(const ClassStats& args, void* workspace, int device, void* stream_handle) {
  const DeviceGuard guard(device);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  Arena arena(workspace);
  const FeatureWorkspace w = plan_features(arena, args.n, args.width, args.classes);
  group_rows(w.groups, args.labels, args.counts, stream);
  feature_segments<<<grid(args.width, w.groups.max_segments), kBlock, 0, stream>>>(args, w.groups, w.sums, w.squares);
  check(cudaGetLastError());
  feature_classes<<<grid(args.width, args.classes), kBlock, 0, stream>>>(args, w.groups, w.sums, w.squares);
  check(cudaGetLastError());
}

}  // namespace pudnet
