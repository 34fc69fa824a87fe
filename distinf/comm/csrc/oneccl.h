// The part of oneCCL's binary interface (libccl.so.1, namespace ccl::v1) that ccl.cpp calls. Its own headers come in a
// package of 250 MB and would have to be there at build time; so the signatures are declared here, with the sizes of
// the two classes that are returned by value. Checked against the headers of 2021.15 and 2021.16.
#pragma once
#include <array>
#include <cstddef>
#include <memory>
#include <vector>

namespace ccl::v1 {

enum class datatype : int { float32 = 9, bfloat16 = 11 };
enum class reduction : int { sum = 0 };

// Passed by reference only; the library has a default object of each.
struct kvs_attr;
struct comm_attr;
struct allreduce_attr;
extern kvs_attr default_kvs_attr;
extern comm_attr default_comm_attr;
extern allreduce_attr default_allreduce_attr;

// Where ranks find each other; only ever behind a pointer that the library makes.
struct kvs_interface {};
struct kvs : kvs_interface {
  std::array<char, 256> get_address() const;
};

// A shared pointer to the implementation.
struct communicator {
  communicator(communicator&&);
  ~communicator();
  void* impl[2];
};

// A unique pointer to the implementation.
struct event {
  event(event&&) noexcept;
  ~event() noexcept;
  bool test();
  void* impl;
};

std::shared_ptr<kvs> create_main_kvs(const kvs_attr&);
std::shared_ptr<kvs> create_kvs(const std::array<char, 256>& address, const kvs_attr&);
communicator create_communicator(int size, int rank, std::shared_ptr<kvs_interface>, const comm_attr&);
event allreduce(const void* send, void* receive, size_t count, datatype, reduction, const communicator&,
                const allreduce_attr&, const std::vector<event>& dependencies);

}  // namespace ccl::v1
