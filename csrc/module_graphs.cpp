// The part of the Python module pudnet._C that serves graphs; see module.cpp.

#include "module_graphs.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "graph_recurrence.h"
#include "tile_weights.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address, const char* name) {
  if (address == 0 || address % alignof(T) != 0) {
    throw std::invalid_argument("pudnet._C: " + std::string(name) + " must be an aligned, non-null address.");
  }
  return reinterpret_cast<T*>(address);
}

void require_size(std::int64_t size, const char* name) {
  if (size < 1 || size > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("pudnet._C: " + std::string(name) + " must be from 1 to 2^31 - 1; got " +
                                std::to_string(size) + ".");
  }
}

}  // namespace

void bind_graphs(py::module_& m) {
  using address = std::uintptr_t;
  m.def(
      "graph_recurrence_cpu",
      [](address states, address edges, std::int64_t nodes, std::int64_t width, std::int64_t kinds, std::int64_t hidden,
         address message_in_weight, address message_in_bias, address message_out_weight, address message_out_bias,
         address weight_ih, address weight_hh, address bias_ih, address bias_hh, const std::string& instruction_set) {
        require_size(nodes, "nodes");
        require_size(width, "width");
        require_size(kinds, "kinds");
        require_size(hidden, "hidden");
        pudnet::GraphRecurrence args{};
        args.nodes = nodes;
        args.width = width;
        args.kinds = kinds;
        args.hidden = hidden;
        args.edges = pointer<const float>(edges, "edges");
        args.message_in_weight = pointer<const float>(message_in_weight, "message_in_weight");
        args.message_in_bias = pointer<const float>(message_in_bias, "message_in_bias");
        args.message_out_weight = pointer<const float>(message_out_weight, "message_out_weight");
        args.message_out_bias = pointer<const float>(message_out_bias, "message_out_bias");
        args.weight_ih = pointer<const float>(weight_ih, "weight_ih");
        args.weight_hh = pointer<const float>(weight_hh, "weight_hh");
        args.bias_ih = pointer<const float>(bias_ih, "bias_ih");
        args.bias_hh = pointer<const float>(bias_hh, "bias_hh");
        args.states = pointer<float>(states, "states");
        pudnet::graph_recurrence_cpu(args, instruction_set);
      },
      py::kw_only(), py::arg("states"), py::arg("edges"), py::arg("nodes"), py::arg("width"), py::arg("kinds"),
      py::arg("hidden"), py::arg("message_in_weight"), py::arg("message_in_bias"), py::arg("message_out_weight"),
      py::arg("message_out_bias"), py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"),
      py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "tile_weights_cpu",
      [](const std::vector<address>& blocks, const std::vector<address>& targets,
         const std::vector<std::array<std::int64_t, 5>>& sizes, const std::vector<float>& scales) {
        if (targets.size() != blocks.size() || sizes.size() != blocks.size() || scales.size() != blocks.size()) {
          throw std::invalid_argument("pudnet._C: blocks, targets, sizes and scales must be of one length.");
        }
        std::vector<pudnet::Tile> tiles;
        for (std::size_t k = 0; k < blocks.size(); ++k) {
          for (const std::int64_t size : sizes[k]) require_size(size, "sizes");
          tiles.push_back({pointer<const float>(blocks[k], "blocks"), pointer<float>(targets[k], "targets"), sizes[k][0],
                           sizes[k][1], sizes[k][2], sizes[k][3], sizes[k][4], scales[k]});
        }
        pudnet::tile_weights_cpu(tiles.data(), static_cast<std::int64_t>(tiles.size()));
      },
      py::kw_only(), py::arg("blocks"), py::arg("targets"), py::arg("sizes"), py::arg("scales"),
      py::call_guard<py::gil_scoped_release>());
}
