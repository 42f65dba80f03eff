// The vector code of embed_images.cpp; see instruction_set.h.

#include "vectors.h"

#include "gelu_kernel.h"
#include "layer_norm_kernel.h"

constexpr int kParts = kColumns / kLanes;                             // registers of kColumns outputs
constexpr int kPlaces = kParts == 1 ? 8 : kParts == 2 ? 6 : 3;  // registers for the sums, and for an address each

// kColumns outputs at kPlaces places, through GELU or not. The inputs of a place are `rows` runs of `run` floats, `stride`
// apart, at least one of each. A function of its own, because inlined it finds no registers left for its addresses.
template <bool kGelu>
__attribute__((noinline)) void columns(const float* weight, const float* bias, const float* const* from,
                                       std::int64_t rows, std::int64_t run, std::int64_t stride, float* const* to) {
  Floats sums[kPlaces][kParts];
  for (int p = 0; p < kPlaces; ++p) {
    for (int part = 0; part < kParts; ++part) sums[p][part] = load(bias + part * kLanes);
  }
  const float* x[kPlaces];
  for (int p = 0; p < kPlaces; ++p) x[p] = from[p];
  do {
    std::int64_t j = 0;
    do {
      Floats weights[kParts];
      for (int part = 0; part < kParts; ++part) weights[part] = load(weight + part * kLanes);
      for (int p = 0; p < kPlaces; ++p) {
        for (int part = 0; part < kParts; ++part) sums[p][part] += weights[part] * x[p][j];
      }
      weight += kColumns;
    } while (++j < run);
    for (int p = 0; p < kPlaces; ++p) x[p] += stride;
  } while (--rows > 0);
  for (int p = 0; p < kPlaces; ++p) {
    for (int part = 0; part < kParts; ++part) {
      store(to[p] + part * kLanes, kGelu ? gelu(sums[p][part]) : sums[p][part]);
    }
  }
}

// All outputs of a map at `count` places, the last of which stands in for those that are left over: `place(p, from, to)`
// says where the inputs of place p begin and its outputs go.
template <bool kGelu, typename Place>
inline void map_places(const PackedMap& map, std::int64_t count, std::int64_t rows, std::int64_t run,
                       std::int64_t stride, Place place) {
  for (std::int64_t o = 0; o < map.outputs; o += kColumns) {
    for (std::int64_t first = 0; first < count; first += kPlaces) {
      const float* from[kPlaces];
      float* to[kPlaces];
      for (int p = 0; p < kPlaces; ++p) {
        place(first + p < count ? first + p : count - 1, from[p], to[p]);
        to[p] += o;
      }
      columns<kGelu>(map.weight + o * rows * run, map.bias + o, from, rows, run, stride, to);
    }
  }
}

// `x` [side + 4][side + 4][inputs], zero around the image -> `out` [half + 2 border][half + 2 border][outputs], within.
inline void convolution(const PackedMap& map, const float* x, std::int64_t side, std::int64_t inputs,
                        std::int64_t border, float* out) {
  const std::int64_t half = (side + 1) / 2, row = (side + 4) * inputs, width = half + 2 * border;
  const auto place = [&](std::int64_t p, const float*& from, float*& to) {
    const std::int64_t i = p / half, j = p % half;
    from = x + 2 * i * row + 2 * j * inputs;
    to = out + ((i + border) * width + j + border) * map.outputs;
  };
  map_places<true>(map, half * half, kKernelSide, kKernelSide * inputs, row, place);
}

// One image as floats within its border of two zeros: [side + 4][side + 4][3]. The patterns are [side, 3].
inline void prepare(const std::uint8_t* pixels, std::int64_t side, const float* __restrict__ scales,
                    const float* __restrict__ shifts, float* __restrict__ out) {
  for (std::int64_t row = 0; row < side; ++row) {
    const std::uint8_t* from = pixels + row * side * 3;
    float* __restrict__ to = out + ((row + 2) * (side + 4) + 2) * 3;
    for (std::int64_t j = 0; j < side * 3; ++j) to[j] = static_cast<float>(from[j]) * scales[j] + shifts[j];
  }
}

// Images `first` .. `first` + `count` - 1, all of it. `scratch`: as Sizes says, zeros at first.
void embed(const EmbedImages& args, const Sizes& sizes, std::int64_t first, std::int64_t count, float* scratch) {
  float* planes[kConvolutions];
  float* next = scratch;
  for (int c = 0; c < kConvolutions; ++c) {
    planes[c] = next;
    next += sizes.planes[c];
  }
  float* scales = next;
  float* shifts = scales + args.side * 3;
  float* flat = shifts + args.side * 3;  // [count, last]
  for (std::int64_t j = 0; j < args.side * 3; ++j) {
    scales[j] = args.scale[j % 3];
    shifts[j] = args.shift[j % 3];
  }
  for (std::int64_t n = 0; n < count; ++n) {
    prepare(args.pixels + (first + n) * args.side * args.side * 3, args.side, scales, shifts, planes[0]);
    std::int64_t side = args.side, inputs = 3;
    for (int c = 0; c < kConvolutions; ++c) {
      const bool last = c + 1 == kConvolutions;
      convolution(args.convolutions[c], planes[c], side, inputs, last ? 0 : 2,
                  last ? flat + n * sizes.last : planes[c + 1]);
      side = (side + 1) / 2;
      inputs = args.convolutions[c].outputs;
    }
  }
  float* features = args.features + first * args.linear.outputs;
  const auto place = [&](std::int64_t n, const float*& from, float*& to) {
    from = flat + n * sizes.last;
    to = features + n * args.linear.outputs;
  };
  map_places<false>(args.linear, count, 1, sizes.last, 0, place);
  for (std::int64_t n = 0; args.norm_weight != nullptr && n < count; ++n) {
    float* row = features + n * args.linear.outputs;
    layer_norm(row, args.linear.outputs, args.norm_weight, args.norm_bias, row);
  }
  gelu_in_place(features, count * args.linear.outputs);
}

constexpr Kernels kKernels = {&embed};
