// What one rank computes with: its threads, its kernels and the memory of its packed weights.
#pragma once
#include <cstdint>
#include <vector>

#include "arena.h"
#include "isa.h"
#include "kernel_table.h"
#include "step_program.h"
#include "thread_team.h"

namespace distinf {

class Runtime {
 public:
  // The caller has checked isa_available(isa); tests that emulate an instruction set have not.
  Runtime(Isa isa, const std::vector<int>& cpus, bool oversubscribed)
      : kernels(table(isa)), team(cpus, oversubscribed) {}

  const KernelTable& kernels;
  ThreadTeam team;
  Arena arena;

  // Memory that an operation may use while it runs. Reserve before the team starts; the address may then change.
  void reserve_scratch(int64_t bytes) {
    if (static_cast<int64_t>(scratch_.size()) < bytes + 64) scratch_.resize(bytes + 64);
  }
  char* scratch() { return scratch_.data() + (-reinterpret_cast<uintptr_t>(scratch_.data()) & 63); }

  // Runs an operation on the team now and, while a step is recorded, keeps it for replay.
  void execute(Op op) {
    team.run(op);
    if (recording) recording->add(std::move(op));
  }
  StepProgram* recording = nullptr;

 private:
  std::vector<char> scratch_;

  static const KernelTable& table(Isa isa) {
    switch (isa) {
      case Isa::kAvx512: return kAvx512Kernels;
      case Isa::kAvx512Bf16: return kAvx512Bf16Kernels;
      case Isa::kAmx: return kAmxKernels;
      default: return kAvx2Kernels;
    }
  }
};

}  // namespace distinf
