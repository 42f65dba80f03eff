// Features of sketch images on the CPU. Channels are the lanes, so that convolutions need no transposed copies; an image
// goes through all of them while it is in the caches, and the linear map's weights are read once for many images.

#include "embed_images.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "instruction_set.h"

namespace pudnet {
namespace {

constexpr std::int64_t kChunk = 48;  // images whose linear map is worked on together; whole blocks of kPlaces

// Floats of scratch.
struct Sizes {
  std::int64_t planes[kConvolutions];  // each convolution's input with its border, which is zero
  std::int64_t last;                   // result of the last one
  std::int64_t all;
};

struct Kernels {
  void (*embed)(const EmbedImages&, const Sizes&, std::int64_t first, std::int64_t count, float* scratch);
};

#define PUDNET_KERNEL "embed_images_kernel.h"
#include "kernel_copies.h"

Sizes sizes_of(const EmbedImages& args) {
  Sizes sizes{};
  std::int64_t side = args.side, inputs = 3;
  for (int c = 0; c < kConvolutions; ++c) {
    sizes.planes[c] = (side + 4) * (side + 4) * inputs;
    sizes.all += sizes.planes[c];
    side = (side + 1) / 2;
    inputs = args.convolutions[c].outputs;
  }
  sizes.last = side * side * inputs;
  sizes.all += 2 * args.side * 3 + kChunk * sizes.last;
  return sizes;
}

}  // namespace

void embed_images_cpu(const EmbedImages& args, int threads, const std::string& instruction_set) {
  const Kernels& kernels = choose_kernels(instruction_set);
  const Sizes sizes = sizes_of(args);
  const std::int64_t chunks = (args.images + kChunk - 1) / kChunk;
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, chunks)));
  std::vector<float> scratch(threads * sizes.all);  // zeros: the borders
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
  for (std::int64_t part = 0; part < threads; ++part) {
    for (std::int64_t c = chunks * part / threads; c < chunks * (part + 1) / threads; ++c) {
      const std::int64_t first = c * kChunk;
      kernels.embed(args, sizes, first, std::min(kChunk, args.images - first), scratch.data() + part * sizes.all);
    }
  }
}

}  // namespace pudnet
