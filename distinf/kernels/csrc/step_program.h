// A recorded run of operations, replayed by the team with one call: no Python, no allocation, no fork and join.
#pragma once
#include <utility>
#include <vector>

#include "thread_team.h"

namespace distinf {

class StepProgram {
 public:
  void add(Op op) { ops_.push_back(std::move(op)); }

  // Same operations on the same addresses; what lies there decides the result.
  void replay(ThreadTeam& team) const {
    team.run([this](const Worker& w) {
      for (size_t i = 0; i < ops_.size(); i++) {
        if (i) w.barrier();
        ops_[i](w);
      }
    });
  }

 private:
  std::vector<Op> ops_;
};

}  // namespace distinf
