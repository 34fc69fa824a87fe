#include "all_reduce.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <chrono>

namespace distinf {
namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Reading every slot costs each rank `ranks` vectors; summing a piece each and reading the sum costs two vectors and
// one more meeting (about 1 us in a socket, in which a core reads about 16 KiB that others wrote).
constexpr int64_t kReadAllBytes = 64 << 10;

// The caches of other ranks hold the lines of what was in a slot before. Taking 1 MiB of them back to write it costs a
// core 20-430 us, as the cores lie to each other; going through memory 25-50 us (perf/LOG.md).
constexpr int64_t kPastCachesNumbers = 64 << 10;

// `to` is aligned to 16 bytes.
void copy_past_caches(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
  std::copy(from + i, from + n, to + i);
  _mm_sfence();  // such stores come in any order: before the barrier that follows
}

}  // namespace

AllReduce::AllReduce(char* memory, int64_t capacity, int rank, int ranks, bool bf16, bool nodes, InterNode inter_node)
    : rank_(rank), ranks_(ranks), bf16_(bf16), nodes_(nodes), inter_node_(std::move(inter_node)), slots_(ranks) {
  move(memory, capacity);
}

void AllReduce::move(char* memory, int64_t capacity) {
  memory_ = memory;
  capacity_ = capacity;
  node_sum_ = part(ranks_);
}

void AllReduce::arrive(Point point) { flag(rank_).stage.store(3 * (count() - 1) + point, std::memory_order_release); }

bool AllReduce::has_arrived(int rank, uint64_t stage) const {
  return flag(rank).stage.load(std::memory_order_acquire) >= stage;
}

void AllReduce::wait_for(int first, int last, Point point, int spins) {
  const uint64_t stage = 3 * (count() - 1) + point;
  while (first < last && has_arrived(first, stage)) first++;
  if (first == last) return;
  const int64_t start = now_ns();
  awaited_.store(stage, std::memory_order_relaxed);
  waiting_since_ns_.store(start, std::memory_order_relaxed);
  for (int rank = first; rank < last; rank++) {
    for (int i = 0; !has_arrived(rank, stage); i++) {
      // Longer than a spin is an uneven load or a core that someone else needs: give it up.
      i < spins ? _mm_pause() : static_cast<void>(sched_yield());
    }
  }
  waiting_since_ns_.store(0, std::memory_order_relaxed);
  waited_ns_ += now_ns() - start;
}

void AllReduce::between_nodes(void* data, int64_t n) {
  const int64_t start = now_ns();
  waiting_since_ns_.store(start, std::memory_order_relaxed);
  inter_node_(data, n, bf16_);
  waiting_since_ns_.store(0, std::memory_order_relaxed);
  waited_ns_ += now_ns() - start;
}

const Parts& AllReduce::exchange(const Worker& w, const KernelTable& kernels, int64_t n, const void* own) {
  const int64_t bytes = n * (bf16_ ? 2 : 4);
  const bool in_pieces = ranks_ > 1 && (nodes_ || (ranks_ > 2 && ranks_ * bytes > kReadAllBytes));
  if (w.index == 0) {
    for (int rank = 0; rank < ranks_; rank++) slots_[rank] = slot(rank);
    if (own) slots_[rank_] = own;
    parts_ = {slots_.data(), ranks_, bf16_};
    turn_ ^= 1;
    count_.fetch_add(1, std::memory_order_relaxed);
    arrive(kSlotsWritten);
    wait_for(0, ranks_, kSlotsWritten, w.spins());
  }
  w.barrier();
  if (in_pieces) {
    sum_piece(w, kernels, n);
    w.barrier();
  }
  if (w.index == 0 && (in_pieces || nodes_)) {
    if (in_pieces) {
      arrive(kPiecesSummed);
      parts_ = {&node_sum_, 1, bf16_};
    }
    if (inter_node_) {
      if (in_pieces) wait_for(0, ranks_, kPiecesSummed, w.spins());
      between_nodes(const_cast<void*>(parts_.data[0]), n);
      arrive(kNodesSummed);
    }
    if (nodes_)
      wait_for(0, 1, kNodesSummed, w.spins());
    else
      wait_for(0, ranks_, kPiecesSummed, w.spins());
  }
  if (in_pieces || nodes_) w.barrier();
  return parts_;
}

// Blocks of whole cache lines, over the node's ranks and then over this rank's workers.
void AllReduce::sum_piece(const Worker& w, const KernelTable& kernels, int64_t n) const {
  constexpr int64_t kBlock = 32;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const int64_t first = blocks * rank_ / ranks_, mine = blocks * (rank_ + 1) / ranks_ - first;
  const int64_t begin = (first + w.begin(mine)) * kBlock, end = std::min((first + w.end(mine)) * kBlock, n);
  if (begin < end) kernels.sum_parts({slots_.data(), ranks_, bf16_}, begin, end, node_sum_, bf16_);
}

void AllReduce::put(const Worker& w, const KernelTable& kernels, const float* y, int64_t n) const {
  const void* from = y;
  if (bf16_ || n < kPastCachesNumbers) {
    kernels.sum_parts({&from, 1, false}, w.begin(n), w.end(n), slot(), bf16_);
    return;
  }
  const int64_t lines = (n + 15) / 16, begin = w.begin(lines) * 16, end = std::min(w.end(lines) * 16, n);
  copy_past_caches(y + begin, end - begin, static_cast<float*>(slot()) + begin);
}

void AllReduce::sum(const Worker& w, const KernelTable& kernels, float* y, int64_t n) {
  const bool as_it_lies = ranks_ == 1 && !bf16_;  // nobody to meet here, nothing to convert
  for (int64_t start = 0; start < n; start += capacity_) {
    const int64_t length = std::min(capacity_, n - start);
    if (as_it_lies) {
      if (w.index == 0 && inter_node_) between_nodes(y + start, length);
      continue;
    }
    put(w, kernels, y + start, length);
    w.barrier();
    const Parts& parts = exchange(w, kernels, length, bf16_ ? nullptr : y + start);
    kernels.sum_parts(parts, w.begin(length), w.end(length), y + start, false);
    w.barrier();  // the next piece moves the parts on
  }
}

std::pair<double, std::vector<int>> AllReduce::waiting() const {
  const int64_t since = waiting_since_ns_.load(std::memory_order_relaxed);
  std::vector<int> missing;
  if (!since) return {0, missing};
  for (int rank = 0; rank < ranks_; rank++) {
    if (!has_arrived(rank, awaited_.load(std::memory_order_relaxed))) missing.push_back(rank);
  }
  return {(now_ns() - since) * 1e-9, missing};
}

}  // namespace distinf
