// The Python module distinf.comm._ccl: all-reduce through oneCCL. Its symbols are found when the module is imported:
// distinf/comm/ccl.py has loaded libccl.so.1 before, so that building and using distinf needs no oneCCL.
#include <pybind11/pybind11.h>
#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "oneccl.h"

namespace py = pybind11;

namespace {

using Address = std::array<char, 256>;

// Where the ranks of a communicator find each other: made by one of them, joined by the others by its address.
class Store {
 public:
  Store() : kvs_(ccl::v1::create_main_kvs(ccl::v1::default_kvs_attr)) {}
  explicit Store(const std::string& address) {
    Address bytes;
    if (address.size() != bytes.size()) throw std::invalid_argument("a oneCCL address has 256 bytes");
    std::copy(address.begin(), address.end(), bytes.begin());
    kvs_ = ccl::v1::create_kvs(bytes, ccl::v1::default_kvs_attr);
  }

  std::string address() const {
    const Address bytes = kvs_->get_address();
    return {bytes.begin(), bytes.end()};
  }
  const std::shared_ptr<ccl::v1::kvs>& kvs() const { return kvs_; }

 private:
  std::shared_ptr<ccl::v1::kvs> kvs_;
};

class Communicator {
 public:
  // Returns when every rank has come.
  Communicator(const Store& store, int rank, int world_size)
      : kvs_(store.kvs()), comm_(ccl::v1::create_communicator(world_size, rank, kvs_, ccl::v1::default_comm_attr)) {}

  // Sums n elements over ranks, in place, the same bits on every rank. Throws what oneCCL throws.
  void all_reduce(void* data, int64_t n, ccl::v1::datatype type) {
    ccl::v1::event done =
        ccl::v1::allreduce(data, data, n, type, ccl::v1::reduction::sum, comm_, ccl::v1::default_allreduce_attr, {});
    // oneCCL's own wait never gives its core away: 4 ranks on 2 cores then take 50-80 ms instead of 0.06 for 16 KiB. A
    // poll costs more than a yield to nobody, so that ranks with a core each lose nothing (2 ranks: 10-11 us both ways).
    while (!done.test()) sched_yield();
  }

 private:
  std::shared_ptr<ccl::v1::kvs> kvs_;
  ccl::v1::communicator comm_;
};

// For callers inside a replayed step, which knows no oneCCL: `context` is a Communicator. 0, or 1 when oneCCL failed.
template <class T, ccl::v1::datatype type>
int all_reduce(void* context, T* data, int64_t n) noexcept {
  try {
    static_cast<Communicator*>(context)->all_reduce(data, n, type);
    return 0;
  } catch (...) {
    return 1;
  }
}

template <class T>
uintptr_t address(int (*function)(void*, T*, int64_t) noexcept) {
  return reinterpret_cast<uintptr_t>(function);
}

}  // namespace

PYBIND11_MODULE(_ccl, m) {
  using ccl::v1::datatype;
  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "oneCCL's all-reduce, on raw addresses";
  m.attr("ALL_REDUCE_FP32") = address(&all_reduce<float, datatype::float32>);
  m.attr("ALL_REDUCE_BF16") = address(&all_reduce<uint16_t, datatype::bfloat16>);

  py::class_<Store>(m, "Store")
      .def(py::init<>())
      .def(py::init<const std::string&>(), py::arg("address"))
      .def_property_readonly("address", [](const Store& s) { return py::bytes(s.address()); });

  py::class_<Communicator>(m, "Communicator")
      .def(py::init<const Store&, int, int>(), py::arg("store"), py::arg("rank"), py::arg("world_size"), WithoutGil())
      .def_property_readonly("context", [](const Communicator& c) { return reinterpret_cast<uintptr_t>(&c); });
}
