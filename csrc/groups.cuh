// Rows grouped by class on the GPU: a stable counting sort of their indices in three small kernels; then each class is cut
// into segments of rows. Included into each .cu file that needs it, whose own copies of the kernels it becomes.
#pragma once

#include <cstdint>

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

// A grid of (blocks of columns) x (things to loop over, as far as the hardware allows).
dim3 grid(std::int64_t columns, std::int64_t things) {
  return dim3(static_cast<u32>(divide_up(columns, kBlock)), static_cast<u32>(things < kMaxGridY ? things : kMaxGridY));
}

}  // namespace
}  // namespace pudnet
