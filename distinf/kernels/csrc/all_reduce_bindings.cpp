#include "all_reduce_bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <variant>

#include "inter_node.h"
#include "isa.h"

namespace py = pybind11;

namespace distinf {
namespace {

// Sums are the same bits in every instruction set: additions in the same order, and conversions that round alike.
const KernelTable& best_kernels() { return isa_available(Isa::kAvx512) ? kAvx512Kernels : kAvx2Kernels; }

using Calls = std::optional<std::variant<MpiCalls, ReduceCalls>>;

InterNode to_inter_node(const Calls& calls) {
  if (!calls) return nullptr;
  if (const auto* mpi = std::get_if<MpiCalls>(&*calls)) return mpi_inter_node(*mpi, best_kernels());
  return call_inter_node(std::get<ReduceCalls>(*calls));
}

}  // namespace

void bind_all_reduce(py::module_& m) {
  py::class_<MpiCalls>(m, "MpiCalls")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int>(),
           py::arg("all_reduce"), py::arg("all_gather"), py::arg("in_place"), py::arg("comm"), py::arg("fp32"),
           py::arg("byte"), py::arg("sum"), py::arg("nodes"));
  py::class_<ReduceCalls>(m, "ReduceCalls")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t>(), py::arg("fp32"), py::arg("bf16"), py::arg("context"));

  py::class_<AllReduce>(m, "AllReduce")
      .def_static("memory_bytes", &AllReduce::memory_bytes, py::arg("ranks"))
      .def_readonly_static("PART_BYTES", &AllReduce::kPartBytes)
      .def_readonly_static("CAPACITY", &AllReduce::kCapacity)
      .def(py::init([](uintptr_t memory, int rank, int ranks, bool bf16, bool nodes, const Calls& inter_node) {
             return std::make_unique<AllReduce>(reinterpret_cast<char*>(memory), rank, ranks, bf16, nodes,
                                                to_inter_node(inter_node));
           }),
           py::arg("memory"), py::arg("rank"), py::arg("ranks"), py::arg("bf16"), py::arg("nodes"),
           py::arg("inter_node"))
      .def(
          "sum_",
          [](AllReduce& self, uintptr_t y, int64_t n) {
            self.sum(Worker{0, 1, nullptr}, best_kernels(), reinterpret_cast<float*>(y), n);
          },
          py::arg("y"), py::arg("n"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("count", &AllReduce::count)
      .def_property_readonly("waited_s", [](const AllReduce& self) { return self.waited_ns() * 1e-9; })
      .def("waiting", &AllReduce::waiting);
}

}  // namespace distinf
