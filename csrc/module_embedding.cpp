// The part of the Python module pudnet._C that embeds images; see module.cpp.

#include "module_embedding.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "embed_images.h"

namespace py = pybind11;

namespace {

constexpr std::int64_t kLargest = 1 << 20;  // of a size, so that no product of theirs overflows

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument("pudnet._C: embed_images: " + text); }

template <typename T>
T* pointer(std::uintptr_t address, const char* name) {
  if (address == 0 || address % alignof(T) != 0) refuse(std::string(name) + " must be an aligned, non-null address.");
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_embedding(py::module_& m) {
  using address = std::uintptr_t;
  m.def(
      "embed_images_cpu",
      [](address pixels, std::int64_t images, std::int64_t side, const std::array<float, 3>& scale,
         const std::array<float, 3>& shift, const std::array<address, pudnet::kConvolutions + 1>& weights,
         const std::array<address, pudnet::kConvolutions + 1>& biases,
         const std::array<std::int64_t, pudnet::kConvolutions + 1>& outputs, address norm_weight, address norm_bias,
         address features, int threads, const std::string& instruction_set) {
        pudnet::EmbedImages args{};
        if (images < 1 || images > kLargest || side < 1 || side > kLargest) refuse("images and side must be sizes.");
        args.pixels = pointer<const std::uint8_t>(pixels, "pixels");
        args.images = images;
        args.side = side;
        for (int c = 0; c < 3; ++c) {
          args.scale[c] = scale[c];
          args.shift[c] = shift[c];
        }
        for (std::size_t k = 0; k < outputs.size(); ++k) {
          if (outputs[k] < 1 || outputs[k] > kLargest || outputs[k] % pudnet::kColumns != 0) {
            refuse("outputs must be multiples of " + std::to_string(pudnet::kColumns) + ".");
          }
          pudnet::PackedMap& map = k < pudnet::kConvolutions ? args.convolutions[k] : args.linear;
          map = {pointer<const float>(weights[k], "weights"), pointer<const float>(biases[k], "biases"), outputs[k]};
        }
        if (norm_weight != 0) {
          args.norm_weight = pointer<const float>(norm_weight, "norm_weight");
          args.norm_bias = pointer<const float>(norm_bias, "norm_bias");
        }
        args.features = pointer<float>(features, "features");
        pudnet::embed_images_cpu(args, threads, instruction_set);
      },
      py::kw_only(), py::arg("pixels"), py::arg("images"), py::arg("side"), py::arg("scale"), py::arg("shift"),
      py::arg("weights"), py::arg("biases"), py::arg("outputs"), py::arg("norm_weight"), py::arg("norm_bias"),
      py::arg("features"), py::arg("threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
