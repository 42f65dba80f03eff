// The vector code of dataset_stats.cpp, for registers of PUDNET_LANES floats; see instruction_set.h.

#include "vectors.h"

typedef std::int32_t Ints __attribute__((vector_size(4 * PUDNET_LANES)));
typedef std::uint8_t Bytes __attribute__((vector_size(kGroup)));

// The bytes from `part` on, as many as there are lanes. GCC 12 would convert them one by one.
inline Ints widen(Bytes bytes, int part) {
#if PUDNET_LANES == 16
  (void)part;
  return reinterpret_cast<Ints>(_mm512_maskz_cvtepu8_epi32(0xffff, reinterpret_cast<__m128i>(bytes)));
#elif PUDNET_LANES == 8
  const __m128i all = reinterpret_cast<__m128i>(bytes);
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(part == 0 ? all : _mm_unpackhi_epi64(all, all)));
#elif defined(__SSE2__)
  const __m128i all = reinterpret_cast<__m128i>(bytes), zero = _mm_setzero_si128();
  const __m128i half = part < 8 ? _mm_unpacklo_epi8(all, zero) : _mm_unpackhi_epi8(all, zero);
  return reinterpret_cast<Ints>(part % 8 == 0 ? _mm_unpacklo_epi16(half, zero) : _mm_unpackhi_epi16(half, zero));
#else
  return Ints{bytes[part], bytes[part + 1], bytes[part + 2], bytes[part + 3]};
#endif
}

inline void add(Ints values, std::uint32_t* to) {
  Ints sums;
  std::memcpy(&sums, to, sizeof sums);
  sums += values;
  std::memcpy(to, &sums, sizeof sums);
}

inline void stream(float* to, Floats value) {
#if PUDNET_LANES == 16
  _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#elif PUDNET_LANES == 8
  _mm256_stream_ps(to, reinterpret_cast<__m256>(value));
#elif defined(__SSE2__)
  _mm_stream_ps(to, reinterpret_cast<__m128>(value));
#else
  store(to, value);
#endif
}

inline Bytes upper_half(Bytes x) {
  return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline Bytes interleave(Bytes x, Bytes y) {  // their lower halves
  return __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

// 16 pixels [16, channels] -> [channels, 16].
inline void split(const std::uint8_t* pixels, std::int64_t channels, Bytes* planes) {
  if (channels == 1) {
    std::memcpy(planes, pixels, kGroup);
    return;
  }
  if (channels != 3) {
    for (std::int64_t c = 0; c < channels; ++c) {
      for (int p = 0; p < kGroup; ++p) planes[c][p] = pixels[p * channels + c];
    }
    return;
  }
  Bytes a, b, c;
  std::memcpy(&a, pixels, kGroup);
  std::memcpy(&b, pixels + kGroup, kGroup);
  std::memcpy(&c, pixels + 2 * kGroup, kGroup);
  // To interleave the halves of 48 bytes moves byte i to 2 i mod 47; four times over, to 16 i mod 47: bytes three apart
  // become neighbours, as 16 * 3 = 48.
  for (int round = 0; round < 4; ++round) {
    const Bytes first = interleave(a, upper_half(b)), second = interleave(upper_half(a), c);
    c = interleave(b, upper_half(c));
    a = first;
    b = second;
  }
  planes[0] = a;
  planes[1] = b;
  planes[2] = c;
}

// kImages images at once, a multiple of 16 pixels of each; kChannels 0 stands for any number.
template <int kChannels, int kImages, bool kStream>
void add_groups(const ImageStats& args, const ImageRows& rows, std::int64_t count, std::int64_t step,
                std::uint32_t* sums, std::uint32_t* squares) {
  const std::int64_t channels = kChannels ? kChannels : args.channels;
  Bytes planes[kImages][kChannels ? kChannels : kMaxChannels];
  for (std::int64_t p = 0; p < count; p += kGroup) {
    for (int u = 0; u < kImages; ++u) {
      split(rows.pixels[u] + p * channels, channels, planes[u]);
      __builtin_prefetch(rows.upcoming[u] + p * channels);
    }
    for (std::int64_t c = 0; c < channels; ++c) {
      const Floats scale = Floats{} + args.scale[c], shift = Floats{} + args.shift[c];
      for (int part = 0; part < kGroup; part += kLanes) {
        Ints sum{}, square{};
        for (int u = 0; u < kImages; ++u) {
          const Ints values = widen(planes[u][c], part);
          sum += values;
          square += values * values;
          const Floats result = __builtin_convertvector(values, Floats) * scale + shift;
          float* const to = rows.sketch[u] + c * args.pixels + p + part;
          if (kStream) {
            stream(to, result);
          } else {
            store(to, result);
          }
        }
        add(sum, sums + c * step + p + part);
        add(square, squares + c * step + p + part);
      }
    }
  }
}

// One number after another.
inline void add_rest(const ImageStats& args, const ImageRows& rows, std::int64_t first, std::int64_t count,
                     std::uint32_t* sums, std::uint32_t* squares) {
  for (int u = 0; u < rows.count; ++u) {
    for (std::int64_t c = 0; c < args.channels; ++c) {
      for (std::int64_t p = first; p < count; ++p) {
        const std::uint32_t value = rows.pixels[u][p * args.channels + c];
        sums[c * count + p] += value;
        squares[c * count + p] += value * value;
        rows.sketch[u][c * args.pixels + p] = static_cast<float>(value) * args.scale[c] + args.shift[c];
      }
    }
  }
}

template <int kChannels, int kImages>
void add_images(const ImageStats& args, const ImageRows& rows, std::int64_t count, bool streamed, std::uint32_t* sums,
                std::uint32_t* squares) {
  const std::int64_t whole = count / kGroup * kGroup;
  if (streamed) {
    add_groups<kChannels, kImages, true>(args, rows, whole, count, sums, squares);
  } else {
    add_groups<kChannels, kImages, false>(args, rows, whole, count, sums, squares);
  }
  add_rest(args, rows, whole, count, sums, squares);
}

// Adds `count` pixels of one or kUnroll images to the sums [channels, count] and writes their normalised values.
inline void add_rows(const ImageStats& args, const ImageRows& rows, std::int64_t count, bool streamed,
                     std::uint32_t* sums, std::uint32_t* squares) {
  const auto add = args.channels == 3 ? (rows.count == 1 ? add_images<3, 1> : add_images<3, kUnroll>)
                                      : (rows.count == 1 ? add_images<0, 1> : add_images<0, kUnroll>);
  add(args, rows, count, streamed, sums, squares);
}

// What moments_of_bytes does, for many columns and counts up to kNarrowCount.
inline void narrow_moments(std::int64_t columns, std::int64_t count, const std::uint64_t* sum,
                           const std::uint64_t* squares, float* means, float* variances) {
  const double n = static_cast<double>(count), mean_unit = 1.0 / (255.0 * n);
  const double variance_unit = mean_unit * mean_unit;
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::uint64_t spread = static_cast<std::uint64_t>(count) * squares[j] - sum[j] * sum[j];
    means[j] = static_cast<float>(static_cast<double>(sum[j]) * mean_unit);
    variances[j] = static_cast<float>(static_cast<double>(spread) * variance_unit);
  }
}

inline void add_deviations(const float* const rows[kUnroll], int columns, const double* __restrict__ shift,
                           double* __restrict__ sum, double* __restrict__ squares) {
  const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  for (int j = 0; j < columns; ++j) {
    const double va = a[j] - shift[j], vb = b[j] - shift[j], vc = c[j] - shift[j], vd = d[j] - shift[j];
    sum[j] += (va + vb) + (vc + vd);
    squares[j] += (va * va + vb * vb) + (vc * vc + vd * vd);
  }
}

constexpr Kernels kKernels = {add_rows, narrow_moments, add_deviations};
