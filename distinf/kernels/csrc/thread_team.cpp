#include "thread_team.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace distinf {
namespace {

void pin_this_thread(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a refused pin only costs speed
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t old) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

ThreadTeam::ThreadTeam(const std::vector<int>& cpus, bool oversubscribed)
    : spins_(oversubscribed ? 0 : kSpins), spins_between_(oversubscribed ? 0 : kSpinsBetween) {
  pin_this_thread(cpus.at(0));
  for (size_t i = 1; i < cpus.size(); i++) {
    workers_.emplace_back(&ThreadTeam::work, this, static_cast<int>(i), cpus[i]);
  }
}

ThreadTeam::~ThreadTeam() {
  stop_ = true;
  change(generation_);
  for (auto& worker : workers_) worker.join();
}

// Sequentially consistent on both sides: either the sleeper sees the new word or the waker sees the sleeper.
void ThreadTeam::change(std::atomic<uint32_t>& word) {
  word.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) futex_wake_all(word);
}

void ThreadTeam::wait_change(std::atomic<uint32_t>& word, uint32_t old, int spins) {
  for (int i = 0; i < spins; i++) {
    if (word.load(std::memory_order_acquire) != old) return;
    _mm_pause();
  }
  // A core that someone else needs is given up first; sleeping costs a wake-up of tens of microseconds.
  for (int i = 0; i < 100; i++) {
    if (word.load(std::memory_order_acquire) != old) return;
    sched_yield();
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (word.load(std::memory_order_seq_cst) == old) futex_wait(word, old);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void ThreadTeam::run(const Op& op) {
  const int n = size();
  if (n > 1) {
    op_ = &op;
    change(generation_);
  }
  op(Worker{0, n, this});
  barrier();  // all have finished: op may go out of scope
}

void ThreadTeam::barrier() {
  const int n = size();
  if (n == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    change(phase_);
  } else {
    wait_change(phase_, phase, spins_);
  }
}

void ThreadTeam::work(int index, int cpu) {
  pin_this_thread(cpu);
  uint32_t seen = 0;
  for (;;) {
    wait_change(generation_, seen, spins_between_);
    seen++;
    if (stop_) return;
    (*op_)(Worker{index, size(), this});
    barrier();
  }
}

}  // namespace distinf
