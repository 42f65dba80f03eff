// Dataset statistics on the CPU.
//
// Rows are first grouped by class (a stable counting sort of their indices). Then every task owns one class and one block
// of columns, so that its accumulators stay in the first-level cache, no two tasks write the same place, and the result
// does not depend on how many threads there are.

#include "dataset_stats.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "groups.h"
#include "instruction_set.h"

namespace pudnet {
namespace {

constexpr int kUnroll = 4;                     // rows added at once, so that accumulators are loaded a quarter as often
constexpr int kGroup = 16;                     // pixels taken at once
constexpr int kByteColumns = 1024;             // columns of one task of image_stats
constexpr std::int64_t kFlushRows = 65536;     // 65536 * 255^2 still fits 32 bits
constexpr std::int64_t kStreamElements = 1 << 20;  // a larger sketch, 4 MiB, is written past the caches
constexpr int kFloatColumns = 512;             // columns of one task of class_stats
constexpr std::int64_t kSegmentRows = 8192;    // rows of one task of class_stats

// A block of pixels of one image or of kUnroll images.
struct ImageRows {
  int count;
  const std::uint8_t* pixels[kUnroll];
  const std::uint8_t* upcoming[kUnroll];  // to fetch meanwhile: images of a class lie anywhere, the hardware cannot guess
  float* sketch[kUnroll];
};

struct Kernels {
  void (*add_rows)(const ImageStats&, const ImageRows&, std::int64_t count, bool streamed, std::uint32_t* sums,
                   std::uint32_t* squares);
  void (*narrow_moments)(std::int64_t columns, std::int64_t count, const std::uint64_t* sum,
                         const std::uint64_t* squares, float* means, float* variances);
  void (*add_deviations)(const float* const rows[kUnroll], int columns, const double* shift, double* sum,
                         double* squares);
};

#define PUDNET_KERNEL "dataset_stats_kernel.h"
#include "kernel_copies.h"

// Adds what lies in the 32-bit accumulators to the 64-bit ones, and empties them.
void flush(std::int64_t columns, std::uint32_t* from, std::uint64_t* to) {
  for (std::int64_t j = 0; j < columns; ++j) to[j] += from[j];
  std::fill(from, from + columns, 0u);
}

// One class (K: the unlabelled rows), one block of pixels: the sketch of them, their moments, and their share of the
// per-channel sums. A column is here a place in [channels, count].
void image_task(const ImageStats& args, const Kernels& kernels, const Groups& groups, std::int64_t k,
                std::int64_t first_pixel, std::int64_t count, std::uint64_t* channel_sum,
                std::uint64_t* channel_squares) {
  alignas(64) std::uint32_t sum[kByteColumns] = {}, squares[kByteColumns] = {};
  std::uint64_t total_sum[kByteColumns] = {}, total_squares[kByteColumns] = {};
  const std::int64_t row_size = args.pixels * args.channels, columns = count * args.channels;
  // Only whole cache lines can be written past the caches.
  const bool aligned = reinterpret_cast<std::uintptr_t>(args.sketch) % 64 == 0 && args.pixels % kGroup == 0;
  const bool streamed = aligned && args.n * row_size >= kStreamElements;
  const std::int64_t begin = groups.start[k], end = groups.start[k + 1];
  for (std::int64_t at = begin, flushed = begin; at < end;) {
    ImageRows rows{};
    rows.count = end - at < kUnroll ? 1 : kUnroll;
    for (int u = 0; u < rows.count; ++u) {
      const std::int64_t row = groups.order[at + u] * row_size, next = groups.order[std::min(at + u + kUnroll, end - 1)];
      rows.pixels[u] = args.images + row + first_pixel * args.channels;
      rows.upcoming[u] = args.images + next * row_size + first_pixel * args.channels;
      rows.sketch[u] = args.sketch + row + first_pixel;
    }
    kernels.add_rows(args, rows, count, streamed, sum, squares);
    at += rows.count;
    if (at - flushed > kFlushRows - kUnroll) {
      flush(columns, sum, total_sum);
      flush(columns, squares, total_squares);
      flushed = at;
    }
  }
  flush(columns, sum, total_sum);
  flush(columns, squares, total_squares);
  for (std::int64_t c = 0; c < args.channels; ++c) {
    for (std::int64_t j = c * count; j < (c + 1) * count; ++j) {
      channel_sum[c] += total_sum[j];
      channel_squares[c] += total_squares[j];
    }
  }
  if (k == args.classes) return;
  float means[kByteColumns], variances[kByteColumns];
  if (begin < end && end - begin <= kNarrowCount) {
    kernels.narrow_moments(columns, end - begin, total_sum, total_squares, means, variances);
  } else {
    for (std::int64_t j = 0; j < columns; ++j) {
      moments_of_bytes(end - begin, total_sum[j], total_squares[j], means + j, variances + j);
    }
  }
  const std::int64_t to = k * row_size + first_pixel * args.channels;
  for (std::int64_t c = 0; c < args.channels; ++c) {
    for (std::int64_t p = 0; p < count; ++p) {
      args.means[to + p * args.channels + c] = means[c * count + p];
      args.variances[to + p * args.channels + c] = variances[c * count + p];
    }
  }
}

// Some rows of one class.
struct Segment {
  std::int64_t k, begin, end;
};

}  // namespace

void image_stats_cpu(const ImageStats& args, int threads, const std::string& instruction_set) {
  const Kernels& kernels = choose_kernels(instruction_set);
  const Groups groups = group_rows("image_stats", args.labels, args.n, args.classes);
  for (std::int64_t k = 0; k < args.classes; ++k) args.counts[k] = groups.start[k + 1] - groups.start[k];
  // Whole runs of 64 pixels: the vector loops then have no rest in the usual square images.
  const std::int64_t block = kByteColumns / args.channels / 64 * 64;
  const std::int64_t blocks = (args.pixels + block - 1) / block;
  const std::int64_t tasks = blocks * (args.classes + 1);
  std::uint64_t channel_sum[kMaxChannels] = {}, channel_squares[kMaxChannels] = {};
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1) \
    reduction(+ : channel_sum, channel_squares)
  for (std::int64_t task = 0; task < tasks; ++task) {
    const std::int64_t first = task % blocks * block;
    image_task(args, kernels, groups, task / blocks, first, std::min(block, args.pixels - first), channel_sum,
               channel_squares);
  }
  for (std::int64_t c = 0; c < args.channels; ++c) {
    moments_of_bytes(args.n * args.pixels, channel_sum[c], channel_squares[c], args.channel_mean + c,
                     args.channel_var + c);
  }
}

void class_stats_cpu(const ClassStats& args, int threads, const std::string& instruction_set) {
  const Kernels& kernels = choose_kernels(instruction_set);
  const Groups groups = group_rows("class_stats", args.labels, args.n, args.classes);
  std::vector<Segment> segments;
  std::vector<std::size_t> first_segment(args.classes + 1, 0);
  for (std::int64_t k = 0; k < args.classes; ++k) {
    args.counts[k] = groups.start[k + 1] - groups.start[k];
    for (std::int64_t begin = groups.start[k]; begin < groups.start[k + 1]; begin += kSegmentRows) {
      segments.push_back({k, begin, std::min(begin + kSegmentRows, groups.start[k + 1])});
    }
    first_segment[k + 1] = segments.size();
  }
  const auto row = [&](std::int64_t at) { return args.features + groups.order[at] * args.row_stride; };
  const std::int64_t blocks = (args.width + kFloatColumns - 1) / kFloatColumns;
  const std::int64_t tasks = blocks * static_cast<std::int64_t>(segments.size());
  const std::unique_ptr<double[]> sums(new double[segments.size() * args.width]);
  const std::unique_ptr<double[]> squares(new double[segments.size() * args.width]);

#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (std::int64_t task = 0; task < tasks; ++task) {
    const Segment segment = segments[task / blocks];
    const std::int64_t first = task % blocks * kFloatColumns;
    const int columns = static_cast<int>(std::min<std::int64_t>(kFloatColumns, args.width - first));
    const float* member = row(groups.start[segment.k]) + first;  // deviates from itself by 0, so it also fills up
    const std::int64_t to = task / blocks * args.width + first;
    double shift[kFloatColumns];
    std::copy(member, member + columns, shift);
    std::fill_n(sums.get() + to, columns, 0.0);
    std::fill_n(squares.get() + to, columns, 0.0);
    for (std::int64_t at = segment.begin; at < segment.end; at += kUnroll) {
      const float* rows[kUnroll];
      for (int u = 0; u < kUnroll; ++u) rows[u] = at + u < segment.end ? row(at + u) + first : member;
      kernels.add_deviations(rows, columns, shift, sums.get() + to, squares.get() + to);
    }
  }

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t k = 0; k < args.classes; ++k) {
    float *means = args.means + k * args.width, *variances = args.variances + k * args.width;
    if (args.counts[k] == 0) {
      std::fill_n(means, args.width, 0.0f);
      std::fill_n(variances, args.width, 0.0f);
      continue;
    }
    const float* member = row(groups.start[k]);
    for (std::int64_t j = 0; j < args.width; ++j) {
      double sum = 0.0, square = 0.0;
      for (std::size_t s = first_segment[k]; s < first_segment[k + 1]; ++s) {
        sum += sums[s * args.width + j];
        square += squares[s * args.width + j];
      }
      moments_of_deviations(args.counts[k], member[j], sum, square, means + j, variances + j);
    }
  }
}

const char* cpu_instruction_set() {
  switch (choose_instruction_set("")) {
    case InstructionSet::kAvx512:
      return "AVX-512";
    case InstructionSet::kAvx2:
      return "AVX2";
    default:
      return "portable";
  }
}

}  // namespace pudnet
