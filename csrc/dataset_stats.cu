// Dataset statistics on the GPU.
//
// As on the CPU, row indices are first grouped by class (a stable counting sort, three small kernels), and each class is
// cut into segments of rows. Stage one: a block owns a segment and 256 columns, and writes their sums. Stage two: a
// thread owns a class and a column, and adds the segments' sums in order. There are no floating-point atomics, so two
// runs are equal to the last bit; the only atomics add integers, where order does not matter.

#include "dataset_stats.h"
#include "device.cuh"

namespace pudnet {
namespace {

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int kBlock = 256;       // threads of a block, columns of a stage-one block, and labels of a chunk
constexpr int kScanBlock = 1024;
constexpr std::int64_t kMaxGridY = 65535;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Rows grouped by class, on the device. Class K holds the unlabelled rows.
struct Groups {
  std::int64_t n, classes, chunks, segment_rows, max_segments;
  int* invalid;                 // [1] nonzero when a label is out of range
  std::int64_t* histogram;      // [(K + 1) * chunks + 1], class-major; after the scan: first position of (class, chunk)
  std::int64_t* first_segment;  // [K + 2]
  int* rank;                    // [n] place of a row among those of its class in its chunk
  std::int64_t* order;          // [n]

  __device__ std::int64_t start(std::int64_t k) const { return histogram[k * chunks]; }
};

Groups plan_groups(Arena& arena, std::int64_t n, std::int64_t classes) {
  Groups g{};
  g.n = n;
  g.classes = classes;
  g.chunks = n > 0 ? divide_up(n, kBlock) : 1;
  // About a thousand segments fill a GPU and keep the second stage small; 65536 bytes squared still fit 32 bits.
  g.segment_rows = divide_up(n, 1024);
  g.segment_rows = g.segment_rows < 32 ? 32 : g.segment_rows > 65536 ? 65536 : g.segment_rows;
  g.max_segments = n / g.segment_rows + classes + 1;
  g.invalid = arena.take<int>(1);
  g.histogram = arena.take<std::int64_t>((classes + 1) * g.chunks + 1);
  g.first_segment = arena.take<std::int64_t>(classes + 2);
  g.rank = arena.take<int>(n);
  g.order = arena.take<std::int64_t>(n);
  return g;
}

__device__ std::int64_t class_of(const Groups& g, std::int64_t label) {
  return label >= 0 && label < g.classes ? label : g.classes;
}

__global__ void __launch_bounds__(kBlock) rank_labels(Groups g, const std::int64_t* labels) {
  __shared__ std::int64_t classes[kBlock];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  std::int64_t own = -1;
  if (row < g.n) {
    const std::int64_t label = labels[row];
    own = class_of(g, label);
    if (label < -1 || label >= g.classes) *g.invalid = 1;
  }
  classes[threadIdx.x] = own;
  __syncthreads();
  if (row >= g.n) return;
  int before = 0, after = 0;
  for (int other = 0; other < kBlock; ++other) {
    const bool same = classes[other] == own;
    before += same && other < static_cast<int>(threadIdx.x);
    after += same && other > static_cast<int>(threadIdx.x);
  }
  g.rank[row] = before;
  if (after == 0) g.histogram[own * g.chunks + blockIdx.x] = before + 1;
}

// values[i] <- sum of values[0..i-1], for i = 0..count (one more than there are values), by one block.
__device__ void exclusive_scan(std::int64_t* values, std::int64_t count) {
  __shared__ std::int64_t warps[kScanBlock / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  std::int64_t carry = 0;
  for (std::int64_t first = 0; first < count; first += kScanBlock) {
    const std::int64_t i = first + threadIdx.x;
    const std::int64_t own = i < count ? values[i] : 0;
    std::int64_t inclusive = own;
    for (int step = 1; step < 32; step *= 2) {
      const std::int64_t left = __shfl_up_sync(0xffffffffu, inclusive, step);
      if (lane >= step) inclusive += left;
    }
    if (lane == 31) warps[warp] = inclusive;
    __syncthreads();
    std::int64_t earlier = 0, total = 0;
    for (int w = 0; w < kScanBlock / 32; ++w) {
      if (w < warp) earlier += warps[w];
      total += warps[w];
    }
    if (i < count) values[i] = carry + earlier + inclusive - own;
    carry += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) values[count] = carry;
  __syncthreads();
}

__global__ void __launch_bounds__(kScanBlock) scan_groups(Groups g, std::int64_t* counts) {
  exclusive_scan(g.histogram, (g.classes + 1) * g.chunks);
  const bool invalid = *g.invalid != 0;
  for (std::int64_t k = threadIdx.x; k <= g.classes; k += kScanBlock) {
    const std::int64_t rows = g.start(k + 1) - g.start(k);
    g.first_segment[k] = (rows + g.segment_rows - 1) / g.segment_rows;
    if (k < g.classes) counts[k] = invalid ? -1 : rows;
  }
  __syncthreads();
  exclusive_scan(g.first_segment, g.classes + 1);
}

__global__ void __launch_bounds__(kBlock) scatter_rows(Groups g, const std::int64_t* labels) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= g.n) return;
  g.order[g.histogram[class_of(g, labels[row]) * g.chunks + blockIdx.x] + g.rank[row]] = row;
}

void group_rows(const Groups& g, const std::int64_t* labels, std::int64_t* counts, cudaStream_t stream) {
  check(cudaMemsetAsync(g.invalid, 0, sizeof(int), stream));
  check(cudaMemsetAsync(g.histogram, 0, ((g.classes + 1) * g.chunks + 1) * sizeof(std::int64_t), stream));
  const dim3 chunks(static_cast<u32>(g.chunks));
  rank_labels<<<chunks, kBlock, 0, stream>>>(g, labels);
  check(cudaGetLastError());
  scan_groups<<<1, kScanBlock, 0, stream>>>(g, counts);
  check(cudaGetLastError());
  scatter_rows<<<chunks, kBlock, 0, stream>>>(g, labels);
  check(cudaGetLastError());
}

// The class a segment belongs to, and its rows as positions in g.order.
struct Segment {
  std::int64_t k, begin, end;
};

__device__ Segment segment_at(const Groups& g, std::int64_t index) {
  std::int64_t low = 0, high = g.classes;  // the last class whose first segment is not beyond `index`
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (g.first_segment[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const std::int64_t begin = g.start(low) + (index - g.first_segment[low]) * g.segment_rows;
  const std::int64_t end = begin + g.segment_rows, stop = g.start(low + 1);
  return {low, begin, end < stop ? end : stop};
}

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

// A grid of (blocks of columns) x (things to loop over, as far as the hardware allows).
dim3 grid(std::int64_t columns, std::int64_t things) {
  return dim3(static_cast<u32>(divide_up(columns, kBlock)), static_cast<u32>(things < kMaxGridY ? things : kMaxGridY));
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
