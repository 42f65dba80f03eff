// The part of the Python module pudnet._C that serves patch_covariance; see module.cpp.

#include "module_patches.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "patch_covariance.h"

namespace py = pybind11;

namespace {

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument("pudnet._C: " + text); }

template <typename T>
T* pointer(std::uintptr_t address, const char* name) {
  if (address == 0 || address % alignof(T) != 0) refuse(std::string(name) + " must be an aligned, non-null address.");
  return reinterpret_cast<T*>(address);
}

// `sizes`: n, channels, height, width; `strides`: of the same axes, in elements. Only n may be 0.
pudnet::PatchCovariance arguments(std::uintptr_t images, std::uintptr_t groups, const std::vector<std::int64_t>& sizes,
                                  const std::vector<std::int64_t>& strides, std::int64_t group_count,
                                  std::int64_t kernel, std::int64_t padding, std::uintptr_t means,
                                  std::uintptr_t covariances, std::uintptr_t counts) {
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  if (sizes.size() != 4 || strides.size() != 4) refuse("sizes and strides must have four numbers.");
  for (int axis = 0; axis < 4; ++axis) {
    if (sizes[axis] < (axis == 0 ? 0 : 1) || sizes[axis] > kLargest) refuse("sizes must be from 1 to 2^31 - 1.");
    if (strides[axis] < 0) refuse("strides must not be negative.");
  }
  if (group_count < 1) refuse("group_count must be at least 1.");
  if (padding < 0 || padding > 1024) refuse("padding must be from 0 to 1024.");
  const std::int64_t least = (sizes[2] < sizes[3] ? sizes[2] : sizes[3]) + 2 * padding;
  if (kernel < 1 || kernel > 1024 || kernel > least) refuse("kernel must be from 1 to the size of a padded image.");
  const std::int64_t square = kernel * kernel;
  if (sizes[1] > kLargest / square) refuse("the sizes overflow.");
  pudnet::PatchCovariance args{};
  args.n = sizes[0];
  args.channels = sizes[1];
  args.height = sizes[2];
  args.width = sizes[3];
  if (args.n > 0) {
    args.images = pointer<const float>(images, "images");
    args.groups = pointer<const std::int64_t>(groups, "groups");
  }
  args.image_stride = strides[0];
  args.channel_stride = strides[1];
  args.row_stride = strides[2];
  args.column_stride = strides[3];
  args.group_count = group_count;
  args.kernel = kernel;
  args.padding = padding;
  args.means = pointer<float>(means, "means");
  args.covariances = pointer<float>(covariances, "covariances");
  args.counts = pointer<std::int64_t>(counts, "counts");
  return args;
}

}  // namespace

#define PATCH_PARAMETERS                                                                                             \
  py::arg("images"), py::arg("groups"), py::arg("sizes"), py::arg("strides"), py::arg("group_count"),                \
      py::arg("kernel"), py::arg("padding"), py::arg("means"), py::arg("covariances"), py::arg("counts")

void bind_patches(py::module_& m) {
  using address = std::uintptr_t;
  using std::int64_t;
  using numbers = const std::vector<std::int64_t>&;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "patch_covariance_cpu",
      [](address images, address groups, numbers sizes, numbers strides, int64_t group_count, int64_t kernel,
         int64_t padding, address means, address covariances, address counts, int threads,
         const std::string& instruction_set) {
        pudnet::patch_covariance_cpu(arguments(images, groups, sizes, strides, group_count, kernel, padding, means,
                                               covariances, counts),
                                     threads, instruction_set);
      },
      py::kw_only(), PATCH_PARAMETERS, py::arg("threads"), py::arg("instruction_set"), release());
#ifdef PUDNET_WITH_CUDA
  m.def("patch_covariance_workspace", &pudnet::patch_covariance_workspace, py::arg("n"), py::arg("channels"),
        py::arg("groups"), py::arg("patch"));
  m.def(
      "patch_covariance_cuda",
      [](address images, address groups, numbers sizes, numbers strides, int64_t group_count, int64_t kernel,
         int64_t padding, address means, address covariances, address counts, address workspace, int device,
         address stream) {
        pudnet::patch_covariance_cuda(arguments(images, groups, sizes, strides, group_count, kernel, padding, means,
                                                covariances, counts),
                                      pointer<char>(workspace, "workspace"), device, reinterpret_cast<void*>(stream));
      },
      py::kw_only(), PATCH_PARAMETERS, py::arg("workspace"), py::arg("device"), py::arg("stream"), release());
#endif
}
