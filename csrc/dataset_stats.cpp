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

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// The loops worth vectorising are functions of their own: target_clones does not reach the body of an OpenMP region.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PUDNET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define PUDNET_HAS_CLONES 1
#else
#define PUDNET_CLONES
#endif

namespace pudnet {
namespace {

constexpr int kUnroll = 4;                     // rows added at once, so that accumulators are loaded a quarter as often
constexpr int kByteColumns = 1024;             // columns of one task of image_stats
constexpr std::int64_t kFlushRows = 65536;     // 65536 * 255^2 still fits 32 bits
constexpr std::int64_t kStreamElements = 1 << 20;  // a larger sketch, 4 MiB, is written past the caches
constexpr int kFloatColumns = 512;             // columns of one task of class_stats
constexpr std::int64_t kSegmentRows = 8192;    // rows of one task of class_stats

PUDNET_CLONES void add_bytes(const std::uint8_t* const rows[kUnroll], int columns, std::uint32_t* __restrict__ sum,
                             std::uint32_t* __restrict__ squares) {
  const std::uint8_t *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  for (int j = 0; j < columns; ++j) {
    const std::uint32_t va = a[j], vb = b[j], vc = c[j], vd = d[j];
    sum[j] += (va + vb) + (vc + vd);
    squares[j] += (va * va + vb * vb) + (vc * vc + vd * vd);
  }
}

PUDNET_CLONES void split_rgb(const std::uint8_t* __restrict__ pixels, std::int64_t count, std::uint8_t* __restrict__ red,
                             std::uint8_t* __restrict__ green, std::uint8_t* __restrict__ blue) {
  for (std::int64_t p = 0; p < count; ++p) {
    red[p] = pixels[3 * p];
    green[p] = pixels[3 * p + 1];
    blue[p] = pixels[3 * p + 2];
  }
}

PUDNET_CLONES void scale_bytes(const std::uint8_t* __restrict__ bytes, std::int64_t count, float scale, float shift,
                               float* __restrict__ out) {
  for (std::int64_t p = 0; p < count; ++p) out[p] = static_cast<float>(bytes[p]) * scale + shift;
}

// Writes `count` pixels of one image into channel planes, `plane` elements from one to the next. Splitting the channels
// first leaves the bulk of the work to a loop without shuffles.
void normalise(const ImageStats& args, const std::uint8_t* pixels, std::int64_t count, float* out, std::int64_t plane) {
  std::uint8_t split[kByteColumns];
  if (args.channels == 3) {
    split_rgb(pixels, count, split, split + count, split + 2 * count);
  } else {
    for (std::int64_t c = 0; c < args.channels; ++c) {
      for (std::int64_t p = 0; p < count; ++p) split[c * count + p] = pixels[p * args.channels + c];
    }
  }
  for (std::int64_t c = 0; c < args.channels; ++c) {
    scale_bytes(split + c * count, count, args.scale[c], args.shift[c], out + c * plane);
  }
}

// Copies past the caches where the processor can: a store into them would first read the line it overwrites.
void stream(const float* from, std::int64_t count, float* to) {
#ifdef __SSE2__
  if (reinterpret_cast<std::uintptr_t>(to) % 16 == 0 && count % 4 == 0) {
    for (std::int64_t i = 0; i < count; i += 4) _mm_stream_ps(to + i, _mm_load_ps(from + i));
    return;
  }
#endif
  std::copy(from, from + count, to);
}

// Adds what lies in the 32-bit accumulators to the 64-bit ones, and empties them.
void flush(int columns, std::uint32_t* from, std::uint64_t* to) {
  for (int j = 0; j < columns; ++j) to[j] += from[j];
  std::fill(from, from + columns, 0u);
}

// What moments_of_bytes does, for many columns and counts up to kNarrowCount.
PUDNET_CLONES void narrow_moments(int columns, std::int64_t count, const std::uint64_t* __restrict__ sum,
                                  const std::uint64_t* __restrict__ squares, float* __restrict__ means,
                                  float* __restrict__ variances) {
  const double n = static_cast<double>(count), mean_unit = 1.0 / (255.0 * n);
  const double variance_unit = mean_unit * mean_unit;
  for (int j = 0; j < columns; ++j) {
    const std::uint64_t spread = static_cast<std::uint64_t>(count) * squares[j] - sum[j] * sum[j];
    means[j] = static_cast<float>(static_cast<double>(sum[j]) * mean_unit);
    variances[j] = static_cast<float>(static_cast<double>(spread) * variance_unit);
  }
}

// One class (K: the unlabelled rows), one block of pixels: the sketch of them, their moments, and their share of the
// per-channel sums.
void image_task(const ImageStats& args, const Groups& groups, std::int64_t k, std::int64_t first_pixel, std::int64_t count,
                std::uint64_t* channel_sum, std::uint64_t* channel_squares) {
  static const std::uint8_t zeros[kByteColumns] = {};
  std::uint32_t sum[kByteColumns] = {}, squares[kByteColumns] = {};
  std::uint64_t total_sum[kByteColumns] = {}, total_squares[kByteColumns] = {};
  alignas(64) float planes[kByteColumns];
  const bool streamed = args.n * args.pixels * args.channels >= kStreamElements;
  const std::int64_t row_size = args.pixels * args.channels, first_column = first_pixel * args.channels;
  const int columns = static_cast<int>(count * args.channels);
  const std::int64_t begin = groups.start[k], end = groups.start[k + 1];
  for (std::int64_t at = begin; at < end; at += kUnroll) {
    // The rows of a class lie anywhere, so the hardware cannot guess the next ones.
    for (std::int64_t ahead = at + kUnroll; ahead < std::min(at + 2 * kUnroll, end); ++ahead) {
      const std::uint8_t* next = args.images + groups.order[ahead] * row_size + first_column;
      for (int j = 0; j < columns; j += 64) __builtin_prefetch(next + j);
    }
    const std::uint8_t* rows[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      rows[u] = zeros;
      if (at + u >= end) continue;
      const std::int64_t row = groups.order[at + u];
      rows[u] = args.images + row * row_size + first_column;
      float* const out = args.sketch + row * row_size + first_pixel;
      if (!streamed) {
        normalise(args, rows[u], count, out, args.pixels);
        continue;
      }
      normalise(args, rows[u], count, planes, count);
      for (std::int64_t c = 0; c < args.channels; ++c) stream(planes + c * count, count, out + c * args.pixels);
    }
    add_bytes(rows, columns, sum, squares);
    if ((at - begin + kUnroll) % kFlushRows == 0) {
      flush(columns, sum, total_sum);
      flush(columns, squares, total_squares);
    }
  }
  flush(columns, sum, total_sum);
  flush(columns, squares, total_squares);
  for (std::int64_t c = 0; c < args.channels; ++c) {
    for (std::int64_t j = c; j < columns; j += args.channels) {
      channel_sum[c] += total_sum[j];
      channel_squares[c] += total_squares[j];
    }
  }
  if (k == args.classes) return;
  const std::int64_t to = k * row_size + first_column;
  if (begin < end && end - begin <= kNarrowCount) {
    return narrow_moments(columns, end - begin, total_sum, total_squares, args.means + to, args.variances + to);
  }
  for (int j = 0; j < columns; ++j) {
    moments_of_bytes(end - begin, total_sum[j], total_squares[j], args.means + to + j, args.variances + to + j);
  }
}

PUDNET_CLONES void add_deviations(const float* const rows[kUnroll], int columns, const double* __restrict__ shift,
                                  double* __restrict__ sum, double* __restrict__ squares) {
  const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  for (int j = 0; j < columns; ++j) {
    const double va = a[j] - shift[j], vb = b[j] - shift[j], vc = c[j] - shift[j], vd = d[j] - shift[j];
    sum[j] += (va + vb) + (vc + vd);
    squares[j] += (va * va + vb * vb) + (vc * vc + vd * vd);
  }
}

// Some rows of one class.
struct Segment {
  std::int64_t k, begin, end;
};

}  // namespace

void image_stats_cpu(const ImageStats& args, int threads) {
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
    image_task(args, groups, task / blocks, first, std::min(block, args.pixels - first), channel_sum, channel_squares);
  }
  for (std::int64_t c = 0; c < args.channels; ++c) {
    moments_of_bytes(args.n * args.pixels, channel_sum[c], channel_squares[c], args.channel_mean + c,
                     args.channel_var + c);
  }
}

void class_stats_cpu(const ClassStats& args, int threads) {
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
      add_deviations(rows, columns, shift, sums.get() + to, squares.get() + to);
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
#ifdef PUDNET_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "portable";
}

}  // namespace pudnet
