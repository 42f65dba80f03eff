// Mean and covariance of all k x k patches of images, per group of images; meaning: pudnet/ops/reference.py.
//
// A patch has P = channels * k * k values in the order (channel, row, column). The patches are never written out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pudnet {

struct PatchCovariance {
  const float* images;         // [n, channels, height, width], anywhere in memory: strides in elements
  const std::int64_t* groups;  // [n] in 0..G-1, or -1 for an image of no group
  std::int64_t n, channels, height, width;
  std::int64_t image_stride, channel_stride, row_stride, column_stride;
  std::int64_t group_count, kernel, padding;  // `padding` zeros around every image
  float* means;                // [G, P], 0 for an empty group
  float* covariances;          // [G, P, P], the same
  std::int64_t* counts;        // [G] patches

#ifdef __CUDACC__
#define PUDNET_SHARED __host__ __device__
#else
#define PUDNET_SHARED
#endif
  PUDNET_SHARED std::int64_t out_height() const { return height + 2 * padding - kernel + 1; }
  PUDNET_SHARED std::int64_t out_width() const { return width + 2 * padding - kernel + 1; }
  PUDNET_SHARED std::int64_t patch() const { return channels * kernel * kernel; }
#undef PUDNET_SHARED
};

// Throws std::invalid_argument on a group out of range. The result does not depend on `threads`.
void patch_covariance_cpu(const PatchCovariance& args, int threads, const std::string& instruction_set);

#ifdef PUDNET_WITH_CUDA
// As in dataset_stats.h: nothing waits, a group out of range makes every count -1 and every statistic NaN.
std::size_t patch_covariance_workspace(std::int64_t n, std::int64_t channels, std::int64_t groups, std::int64_t patch);
void patch_covariance_cuda(const PatchCovariance& args, void* workspace, int device, void* stream);
#endif

}  // namespace pudnet
