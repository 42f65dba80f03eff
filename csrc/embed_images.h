// The features of the images of a sketch on the CPU: three 5 x 5 convolutions of stride 2 and padding 2, a linear map, a
// norm, GELU after each map; forward only. Meaning: DatasetEmbedding.image_features in pudnet/nn/embedding.py.
#pragma once

#include <cstdint>
#include <string>

namespace pudnet {

constexpr int kConvolutions = 3;
constexpr int kKernelSide = 5;
constexpr int kColumns = 16;  // outputs of a map that are worked on together

// Maps are packed by kColumns outputs: weight [outputs / 16][inputs][16], bias [outputs]. The inputs of a convolution are
// [5, 5, I], those of the linear map [height, width, channels] of the last convolution's result.
struct PackedMap {
  const float *weight, *bias;
  std::int64_t outputs;  // a multiple of 16
};

struct EmbedImages {
  const std::uint8_t* pixels;  // [n, side, side, 3]
  std::int64_t images, side;
  float scale[3], shift[3];  // of a pixel's channels
  PackedMap convolutions[kConvolutions];
  PackedMap linear;
  const float *norm_weight, *norm_bias;  // LayerNorm [F], or null for none
  float* features;                       // [n, F]
};

// The result of an image depends neither on `threads` nor on the other images. `instruction_set` as in instruction_set.h.
void embed_images_cpu(const EmbedImages& args, int threads, const std::string& instruction_set);

}  // namespace pudnet
