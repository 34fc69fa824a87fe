// A persistent team of pinned threads that run one function together: no fork/join on the token path.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace distinf {

class ThreadTeam;

// What one thread of the team knows while an operation runs.
struct Worker {
  int index;
  int count;
  ThreadTeam* team;  // nullptr: a thread alone

  // Contiguous part of n items that is this worker's, sizes differing by at most one.
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
  void barrier() const;
  // How often to look for what another thread or rank does before giving the core up.
  int spins() const;
};

// An operation: every worker of the team calls it once; it may meet at worker.barrier().
using Op = std::function<void(const Worker&)>;

class ThreadTeam {
 public:
  // One thread per entry of cpus, pinned to it (-1: not pinned). Entry 0 is the calling thread.
  // oversubscribed: other runnable threads share these cores, so waiting yields at once.
  ThreadTeam(const std::vector<int>& cpus, bool oversubscribed);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  // Within an operation, 60-250 us: shorter than a scheduler quantum, should the other thread not be running.
  static constexpr int kSpins = 5000;
  // Between operations, 1-5 ms: longer than the host's part of a decode step, so that workers are awake when the
  // next one starts. On a virtual machine a CPU that slept may come back elsewhere, with half the bandwidth.
  static constexpr int kSpinsBetween = 100000;

  int size() const { return static_cast<int>(workers_.size()) + 1; }
  // Runs op on every thread, the caller included, and returns when all have finished. Op must not throw.
  void run(const Op& op);
  void barrier();
  int spins() const { return spins_; }

 private:
  void work(int index, int cpu);
  // Spins, then yields, then sleeps until word differs from old.
  void wait_change(std::atomic<uint32_t>& word, uint32_t old, int spins);
  // Moves word on, and wakes those that went to sleep on it; no system call when nobody did.
  void change(std::atomic<uint32_t>& word);

  std::vector<std::thread> workers_;
  const Op* op_ = nullptr;
  int spins_, spins_between_;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

inline void Worker::barrier() const {
  if (team) team->barrier();
}
inline int Worker::spins() const { return team ? team->spins() : ThreadTeam::kSpins; }

}  // namespace distinf
