#include <pybind11/pybind11.h>
namespace py = pybind11;
PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] { py::dict d; d["version"] = PUDNET_VERSION; return d; });
}
