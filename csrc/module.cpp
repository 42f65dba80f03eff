// The Python module pudnet._C: argument checks, then the functions of this folder. Tensors arrive as raw addresses, so
// that neither the build nor the binary depends on torch; pudnet/ops/*.py are the only callers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "dataset_stats.h"
#include "device.h"
#include "generate_weights.h"
#include "layer_recurrence.h"
#include "module_embedding.h"
#include "module_graphs.h"
#include "module_patches.h"

namespace py = pybind11;

namespace {

using pudnet::ClassStats;
using pudnet::ImageStats;

// Raise together with INTERFACE in pudnet/_extension.py whenever a signature below changes.
constexpr int kInterface = 4;

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument("pudnet._C: " + text); }

void require_size(std::int64_t size, std::int64_t least, const char* name) {
  if (size < least) {
    refuse(std::string(name) + " must be at least " + std::to_string(least) + "; got " + std::to_string(size) + ".");
  }
}

// The product of sizes; refuses one whose array of 8-byte elements would not fit the address space.
std::int64_t elements(std::initializer_list<std::int64_t> sizes) {
  std::int64_t product = 1;
  for (const std::int64_t size : sizes) {
    if (size != 0 && product > std::numeric_limits<std::int64_t>::max() / 8 / size) refuse("the sizes overflow.");
    product *= size;
  }
  return product;
}

template <typename T>
T* pointer(std::uintptr_t address, std::int64_t size, const char* name) {
  if (address == 0 && size > 0) refuse(std::string(name) + " must not be a null pointer.");
  if (address % alignof(T) != 0) refuse(std::string(name) + " must be aligned to its element size.");
  return reinterpret_cast<T*>(address);
}

ImageStats image_arguments(std::uintptr_t images, std::uintptr_t labels, std::int64_t n, std::int64_t pixels,
                           std::int64_t channels, std::int64_t classes, const std::vector<double>& mean,
                           const std::vector<double>& std, std::uintptr_t sketch, std::uintptr_t channel_mean,
                           std::uintptr_t channel_var, std::uintptr_t counts, std::uintptr_t means,
                           std::uintptr_t variances) {
  require_size(n, 0, "n");
  require_size(pixels, 1, "pixels");
  require_size(channels, 1, "channels");
  require_size(classes, 1, "classes");
  if (channels > pudnet::kMaxChannels) {
    refuse("channels must be at most " + std::to_string(pudnet::kMaxChannels) + "; got " + std::to_string(channels) + ".");
  }
  if (mean.size() != static_cast<std::size_t>(channels) || std.size() != mean.size()) {
    refuse("mean and std must have one value per channel.");
  }
  const std::int64_t all = elements({n, pixels, channels}), statistics = elements({classes + 1, pixels, channels});
  ImageStats args{};
  args.images = pointer<const std::uint8_t>(images, all, "images");
  args.labels = pointer<const std::int64_t>(labels, n, "labels");
  args.n = n;
  args.pixels = pixels;
  args.channels = channels;
  args.classes = classes;
  for (std::int64_t c = 0; c < channels; ++c) {
    if (!(std[c] > 0.0)) refuse("std must be positive.");
    args.scale[c] = static_cast<float>(1.0 / (255.0 * std[c]));
    args.shift[c] = static_cast<float>(-mean[c] / std[c]);
  }
  args.sketch = pointer<float>(sketch, all, "sketch");
  args.channel_mean = pointer<float>(channel_mean, channels, "channel_mean");
  args.channel_var = pointer<float>(channel_var, channels, "channel_var");
  args.counts = pointer<std::int64_t>(counts, classes, "counts");
  args.means = pointer<float>(means, statistics, "means");
  args.variances = pointer<float>(variances, statistics, "variances");
  return args;
}

ClassStats class_arguments(std::uintptr_t features, std::uintptr_t labels, std::int64_t n, std::int64_t width,
                           std::int64_t row_stride, std::int64_t classes, std::uintptr_t counts, std::uintptr_t means,
                           std::uintptr_t variances) {
  require_size(n, 0, "n");
  require_size(width, 1, "width");
  require_size(row_stride, 0, "row_stride");
  require_size(classes, 1, "classes");
  const std::int64_t all = elements({n, width}), statistics = elements({classes + 1, width});
  elements({n, row_stride});
  ClassStats args{};
  args.features = pointer<const float>(features, all, "features");
  args.labels = pointer<const std::int64_t>(labels, n, "labels");
  args.n = n;
  args.width = width;
  args.row_stride = row_stride;
  args.classes = classes;
  args.counts = pointer<std::int64_t>(counts, classes, "counts");
  args.means = pointer<float>(means, statistics, "means");
  args.variances = pointer<float>(variances, statistics, "variances");
  return args;
}

std::vector<pudnet::LayerShape> layer_shapes(const std::vector<std::int64_t>& shapes) {
  if (shapes.empty() || shapes.size() % 4 != 0) refuse("shapes must have four sizes for every layer.");
  std::vector<pudnet::LayerShape> layers;
  for (std::size_t at = 0; at < shapes.size(); at += 4) {
    for (int j = 0; j < 4; ++j) require_size(shapes[at + j], 1, "shapes");
    elements({shapes[at], shapes[at + 1], shapes[at + 2], shapes[at + 3]});
    layers.push_back({shapes[at], shapes[at + 1], shapes[at + 2] * shapes[at + 3]});
  }
  return layers;
}

py::dict build_info() {
  py::dict info;
  info["version"] = PUDNET_VERSION;
  info["interface"] = kInterface;
  info["compiler"] = __VERSION__;
  info["instruction_set"] = pudnet::cpu_instruction_set();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef PUDNET_WITH_CUDA
  info["cuda"] = PUDNET_CUDA_VERSION;
  info["cuda_architectures"] = PUDNET_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace

#define IMAGE_PARAMETERS                                                                                          \
  py::arg("images"), py::arg("labels"), py::arg("n"), py::arg("pixels"), py::arg("channels"), py::arg("classes"), \
      py::arg("mean"), py::arg("std"), py::arg("sketch"), py::arg("channel_mean"), py::arg("channel_var"),        \
      py::arg("counts"), py::arg("means"), py::arg("variances")
#define CLASS_PARAMETERS                                                                                       \
  py::arg("features"), py::arg("labels"), py::arg("n"), py::arg("width"), py::arg("row_stride"),               \
      py::arg("classes"), py::arg("counts"), py::arg("means"), py::arg("variances")

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native code of pudnet; see csrc/. Call it through pudnet.ops.";
  m.def("build_info", &build_info);
  bind_embedding(m);
  bind_graphs(m);
  bind_patches(m);
  using address = std::uintptr_t;
  using std::int64_t;
  using doubles = const std::vector<double>&;
  using release = py::call_guard<py::gil_scoped_release>;

  m.def(
      "image_stats_cpu",
      [](address images, address labels, int64_t n, int64_t pixels, int64_t channels, int64_t classes, doubles mean,
         doubles std, address sketch, address channel_mean, address channel_var, address counts, address means,
         address variances, int threads, const std::string& instruction_set) {
        pudnet::image_stats_cpu(image_arguments(images, labels, n, pixels, channels, classes, mean, std, sketch,
                                                channel_mean, channel_var, counts, means, variances),
                                threads, instruction_set);
      },
      py::kw_only(), IMAGE_PARAMETERS, py::arg("threads"), py::arg("instruction_set") = "", release());
  m.def(
      "class_stats_cpu",
      [](address features, address labels, int64_t n, int64_t width, int64_t row_stride, int64_t classes, address counts,
         address means, address variances, int threads, const std::string& instruction_set) {
        pudnet::class_stats_cpu(
            class_arguments(features, labels, n, width, row_stride, classes, counts, means, variances), threads,
            instruction_set);
      },
      py::kw_only(), CLASS_PARAMETERS, py::arg("threads"), py::arg("instruction_set") = "", release());
  m.def(
      "generate_weights_cpu",
      [](address codes, int64_t batch, int64_t width, int64_t hidden, const std::vector<int64_t>& shapes,
         address fc_weight, address fc_bias, address mix_weight, address mix_bias, address row_weight, address row_bias,
         bool packed, bool bfloat16, address out, bool out_bfloat16, int threads, const std::string& instruction_set) {
        require_size(batch, 0, "batch");
        require_size(width, 1, "width");
        require_size(hidden, 1, "hidden");
        pudnet::GenerateWeights args{};
        args.layers = layer_shapes(shapes);
        int64_t size = 0;
        for (const auto& shape : args.layers) size += shape.o * shape.i * shape.spatial;
        const int64_t layers = static_cast<int64_t>(args.layers.size()), all = elements({batch, size});
        args.codes = pointer<const float>(codes, elements({batch, layers, width}), "codes");
        args.batch = batch;
        args.width = width;
        args.hidden = hidden;
        args.fc_weight = pointer<const float>(fc_weight, 1, "fc_weight");
        args.fc_bias = pointer<const float>(fc_bias, 1, "fc_bias");
        args.mix_weight = pointer<const float>(mix_weight, 1, "mix_weight");
        args.mix_bias = pointer<const float>(mix_bias, 1, "mix_bias");
        args.format = {packed, bfloat16};
        const auto rows = [&](address from, const char* name) -> const void* {
          if (bfloat16) return pointer<const std::uint16_t>(from, 1, name);
          return pointer<const float>(from, 1, name);
        };
        args.row_weight = rows(row_weight, "row_weight");
        args.row_bias = rows(row_bias, "row_bias");
        args.out_bfloat16 = out_bfloat16;
        if (out_bfloat16) {
          args.out = pointer<std::uint16_t>(out, all, "out");
        } else {
          args.out = pointer<float>(out, all, "out");
        }
        pudnet::generate_weights_cpu(args, threads, instruction_set);
      },
      py::kw_only(), py::arg("codes"), py::arg("batch"), py::arg("width"), py::arg("hidden"), py::arg("shapes"),
      py::arg("fc_weight"), py::arg("fc_bias"), py::arg("mix_weight"), py::arg("mix_bias"), py::arg("row_weight"),
      py::arg("row_bias"), py::arg("packed"), py::arg("bfloat16"), py::arg("out"), py::arg("out_bfloat16"),
      py::arg("threads"), py::arg("instruction_set"), release());
  m.def(
      "pack_rows_cpu",
      [](address row_weight, address row_bias, int64_t features, const std::vector<int64_t>& shapes, bool bfloat16,
         address packed_weight, address packed_bias) {
        require_size(features, 1, "features");
        pudnet::pack_rows_cpu(pointer<const float>(row_weight, 1, "row_weight"),
                              pointer<const float>(row_bias, 1, "row_bias"), features, layer_shapes(shapes), bfloat16,
                              pointer<std::uint16_t>(packed_weight, 1, "packed_weight"),
                              pointer<std::uint16_t>(packed_bias, 1, "packed_bias"));
      },
      py::kw_only(), py::arg("row_weight"), py::arg("row_bias"), py::arg("features"), py::arg("shapes"),
      py::arg("bfloat16"), py::arg("packed_weight"), py::arg("packed_bias"), release());
  m.def(
      "layer_recurrence_cpu",
      [](address state, int64_t batch, int64_t layers, int64_t width, int64_t steps, address start, address weight_ih,
         address weight_hh, address bias_ih, address bias_hh, address out_weight, address out_bias,
         address state_norm_weight, address state_norm_bias, address code_norm_weight, address code_norm_bias,
         double alpha, bool normalise_state, address codes, int threads, const std::string& instruction_set) {
        require_size(batch, 0, "batch");
        require_size(layers, 1, "layers");
        require_size(width, 1, "width");
        require_size(steps, 1, "steps");
        elements({layers, 3 * width, width});
        pudnet::LayerRecurrence args{};
        args.batch = batch;
        args.layers = layers;
        args.width = width;
        args.steps = steps;
        args.state = pointer<const float>(state, elements({batch, layers + 8, width}), "state");
        args.start = pointer<const float>(start, 1, "start");
        args.weight_ih = pointer<const float>(weight_ih, 1, "weight_ih");
        args.weight_hh = pointer<const float>(weight_hh, 1, "weight_hh");
        args.bias_ih = pointer<const float>(bias_ih, 1, "bias_ih");
        args.bias_hh = pointer<const float>(bias_hh, 1, "bias_hh");
        args.out_weight = pointer<const float>(out_weight, 1, "out_weight");
        args.out_bias = pointer<const float>(out_bias, 1, "out_bias");
        args.state_norm_weight = pointer<const float>(state_norm_weight, 1, "state_norm_weight");
        args.state_norm_bias = pointer<const float>(state_norm_bias, 1, "state_norm_bias");
        args.code_norm_weight = pointer<const float>(code_norm_weight, 1, "code_norm_weight");
        args.code_norm_bias = pointer<const float>(code_norm_bias, 1, "code_norm_bias");
        args.alpha = static_cast<float>(alpha);
        args.normalise_state = normalise_state;
        args.codes = pointer<float>(codes, elements({batch, steps, width}), "codes");
        pudnet::layer_recurrence_cpu(args, threads, instruction_set);
      },
      py::kw_only(), py::arg("state"), py::arg("batch"), py::arg("layers"), py::arg("width"), py::arg("steps"),
      py::arg("start"), py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"),
      py::arg("out_weight"), py::arg("out_bias"), py::arg("state_norm_weight"), py::arg("state_norm_bias"),
      py::arg("code_norm_weight"), py::arg("code_norm_bias"), py::arg("alpha"), py::arg("normalise_state"),
      py::arg("codes"), py::arg("threads"), py::arg("instruction_set"), release());

#ifdef PUDNET_WITH_CUDA
  m.def("cuda_driver_version", &pudnet::cuda_driver_version);
  m.def("image_stats_workspace", &pudnet::image_stats_workspace, py::arg("n"), py::arg("columns"), py::arg("classes"));
  m.def("class_stats_workspace", &pudnet::class_stats_workspace, py::arg("n"), py::arg("width"), py::arg("classes"));
  m.def(
      "image_stats_cuda",
      [](address images, address labels, int64_t n, int64_t pixels, int64_t channels, int64_t classes, doubles mean,
         doubles std, address sketch, address channel_mean, address channel_var, address counts, address means,
         address variances, address workspace, int device, address stream) {
        pudnet::image_stats_cuda(image_arguments(images, labels, n, pixels, channels, classes, mean, std, sketch,
                                                 channel_mean, channel_var, counts, means, variances),
                                 pointer<void*>(workspace, 1, "workspace"), device, reinterpret_cast<void*>(stream));
      },
      py::kw_only(), IMAGE_PARAMETERS, py::arg("workspace"), py::arg("device"), py::arg("stream"), release());
  m.def(
      "class_stats_cuda",
      [](address features, address labels, int64_t n, int64_t width, int64_t row_stride, int64_t classes, address counts,
         address means, address variances, address workspace, int device, address stream) {
        pudnet::class_stats_cuda(
            class_arguments(features, labels, n, width, row_stride, classes, counts, means, variances),
            pointer<void*>(workspace, 1, "workspace"), device, reinterpret_cast<void*>(stream));
      },
      py::kw_only(), CLASS_PARAMETERS, py::arg("workspace"), py::arg("device"), py::arg("stream"), release());
#endif
}
