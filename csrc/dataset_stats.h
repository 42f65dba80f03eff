// Statistics of a labelled dataset: what csrc/module.cpp calls, and what the CPU and the CUDA side share.
//
// Letters as in docs/design.md: n images or rows, K classes, F features; a column is one (pixel, channel) of an image or
// one feature. A label is in 0..K-1, or -1 for a row of no class. All arrays are dense, in the order of their brackets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pudnet {

constexpr int kMaxChannels = 16;

// One pass over uint8 images. Statistics are of pixel values scaled to 0..1, variances are the population's.
struct ImageStats {
  const std::uint8_t* images;  // [n, pixels, channels]
  const std::int64_t* labels;  // [n]
  std::int64_t n, pixels, channels, classes;
  float scale[kMaxChannels];  // sketch = pixel * scale + shift
  float shift[kMaxChannels];
  float* sketch;        // [n, channels, pixels]
  float* channel_mean;  // [channels] over every pixel of every image, labelled or not
  float* channel_var;   // [channels]
  std::int64_t* counts;  // [K]
  float* means;          // [K, pixels, channels], 0 for an empty class
  float* variances;      // the same
};

// The same class statistics of float features.
struct ClassStats {
  const float* features;  // [n, features], row_stride elements from one row to the next
  const std::int64_t* labels;  // [n]
  std::int64_t n, width, row_stride, classes;
  std::int64_t* counts;  // [K]
  float* means;          // [K, F]
  float* variances;      // [K, F]
};

// Both throw std::invalid_argument on a label out of range. The result does not depend on `threads`. `instruction_set`: see
// instruction_set.h.
void image_stats_cpu(const ImageStats& args, int threads, const std::string& instruction_set);
void class_stats_cpu(const ClassStats& args, int threads, const std::string& instruction_set);
const char* cpu_instruction_set();

#ifdef PUDNET_WITH_CUDA
// Nothing here waits for the GPU, so a label out of range cannot be thrown: it makes every count -1 and every class mean
// and variance NaN. `workspace` is device memory of the given size, aligned to 256 bytes; `stream` is a cudaStream_t.
std::size_t image_stats_workspace(std::int64_t n, std::int64_t columns, std::int64_t classes);
std::size_t class_stats_workspace(std::int64_t n, std::int64_t width, std::int64_t classes);
void image_stats_cuda(const ImageStats& args, void* workspace, int device, void* stream);
void class_stats_cuda(const ClassStats& args, void* workspace, int device, void* stream);
#endif

#ifdef __CUDACC__
#define PUDNET_BOTH __host__ __device__
#else
#define PUDNET_BOTH
#endif

// Mean and variance of `count` values in 0..255, scaled to 0..1, from their exact integer sums. The variance is exact up
// to its last division: count * squares - sum^2 is formed in whole numbers, where nothing is lost. Up to kNarrowCount
// values 64 bits hold it.
constexpr std::int64_t kNarrowCount = 16000000;

PUDNET_BOTH inline void moments_of_bytes(std::int64_t count, std::uint64_t sum, std::uint64_t squares, float* mean,
                                         float* variance) {
  if (count == 0) {
    *mean = *variance = 0.0f;
    return;
  }
  __extension__ typedef unsigned __int128 wide;
  const double n = static_cast<double>(count);
  const wide spread = static_cast<wide>(count) * squares - static_cast<wide>(sum) * sum;
  const double high = static_cast<double>(static_cast<std::uint64_t>(spread >> 64)) * 18446744073709551616.0;
  const double numerator = high + static_cast<double>(static_cast<std::uint64_t>(spread));
  *mean = static_cast<float>(static_cast<double>(sum) / n / 255.0);
  *variance = static_cast<float>(numerator / n / n / (255.0 * 255.0));
}

// Mean and variance from sums of deviations from `shift`, one member of the class. That member's own deviation is part of
// the spread, so the subtraction loses at most a factor of `count` in relative accuracy, which doubles can spare.
PUDNET_BOTH inline void moments_of_deviations(std::int64_t count, double shift, double sum, double squares, float* mean,
                                              float* variance) {
  const double share = 1.0 / static_cast<double>(count);
  const double offset = sum * share;
  const double spread = squares * share - offset * offset;
  *mean = static_cast<float>(shift + offset);
  *variance = static_cast<float>(spread < 0.0 ? 0.0 : spread);  // written so that NaN stays NaN
}

}  // namespace pudnet
