#include "all_reduce_bindings.h"

#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

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

// Seconds that each of `repeats` sums takes as a step has them, one after the other: from partial sums written, which
// is not counted, on all ranks to a sum that can be read (or is in y). y[n] is memory to work on.
std::vector<double> time_s(AllReduce& self, uintptr_t y, int64_t n, int repeats) {
  using Clock = std::chrono::steady_clock;
  const Worker alone{0, 1, nullptr};
  auto* data = reinterpret_cast<float*>(y);
  std::vector<double> seconds(repeats);
  for (double& s : seconds) {
    const bool fits = n <= self.capacity();
    std::memset(fits ? self.slot() : data, 0, n * (fits && self.bf16() ? 2 : 4));
    for (int i = 0; i < 2; i++) self.exchange(alone, best_kernels(), 1);  // to start together; the slot is as before
    const auto start = Clock::now();
    if (fits) {
      const Parts& parts = self.exchange(alone, best_kernels(), n);
      if (parts.count > 1) best_kernels().sum_parts(parts, 0, n, data, false);
    } else {
      self.sum(alone, best_kernels(), data, n);
    }
    s = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return seconds;
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
      .def_static("part_bytes", &AllReduce::part_bytes, py::arg("capacity"))
      .def_static("memory_bytes", &AllReduce::memory_bytes, py::arg("ranks"), py::arg("capacity"))
      .def_readonly_static("LEAST_CAPACITY", &AllReduce::kLeastCapacity)
      .def(py::init([](uintptr_t memory, int64_t capacity, int rank, int ranks, bool bf16, bool nodes,
                       const Calls& inter_node) {
             return std::make_unique<AllReduce>(reinterpret_cast<char*>(memory), capacity, rank, ranks, bf16, nodes,
                                                to_inter_node(inter_node));
           }),
           py::arg("memory"), py::arg("capacity"), py::arg("rank"), py::arg("ranks"), py::arg("bf16"), py::arg("nodes"),
           py::arg("inter_node"))
      .def(
          "move",
          [](AllReduce& self, uintptr_t memory, int64_t capacity) {
            self.move(reinterpret_cast<char*>(memory), capacity);
          },
          py::arg("memory"), py::arg("capacity"))
      .def_property_readonly("capacity", &AllReduce::capacity)
      .def(
          "sum_",
          [](AllReduce& self, uintptr_t y, int64_t n) {
            self.sum(Worker{0, 1, nullptr}, best_kernels(), reinterpret_cast<float*>(y), n);
          },
          py::arg("y"), py::arg("n"), py::call_guard<py::gil_scoped_release>())
      .def("time_s", &time_s, py::arg("y"), py::arg("n"), py::arg("repeats"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("count", &AllReduce::count)
      .def_property_readonly("waited_s", [](const AllReduce& self) { return self.waited_ns() * 1e-9; })
      .def("waiting", &AllReduce::waiting);
}

}  // namespace distinf
