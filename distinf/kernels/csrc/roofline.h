// What this machine can do, measured by the rank's own threads: the ceilings that benchmarks are held against.
#pragma once
#include <vector>

#include "runtime.h"

namespace distinf {

// Memory far larger than the caches, on 2 MiB pages, each part first touched by the worker that will read it.
class ReadProbe {
 public:
  explicit ReadProbe(Runtime& rt);
  int64_t bytes() const { return bytes_; }
  // One read of all of it by the whole team, in seconds. Which loop is faster, with software prefetch or without,
  // differs by CPU: callers take the best of both.
  double read_s(bool prefetch);

 private:
  Runtime& rt_;
  Arena arena_;
  int64_t bytes_;
  char* data_;
  std::vector<int64_t> sinks_;  // a cache line apart; keeps the loads from being dropped
};

// Best of repeats runs of the instruction set's bf16 (or int8) multiply-adds on every thread, in 1e12 operations/s.
double peak_tops(Runtime& rt, bool int8, int repeats);

}  // namespace distinf
