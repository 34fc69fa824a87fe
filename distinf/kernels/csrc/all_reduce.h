// Sums over ranks as part of a step: in shared memory inside a node, by a message-passing library between nodes.
//
// A rank's GEMM writes its partial sums straight into its slot. `exchange` meets the other ranks and hands out the
// vectors whose sum is the answer: in one node the slots themselves, so that whoever needs the sum forms it while
// reading (the norm does). Every rank adds in rank order and gets the same bits.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernel_table.h"

namespace distinf {

// Sums n numbers over the nodes in place, in fp32 or bf16. Called by one thread, on the node's first rank only.
using InterNode = std::function<void(void* data, int64_t n, bool bf16)>;

class AllReduce {
 public:
  // Numbers that a slot holds at least, 1 MiB of fp32: every decode batch that is bound by memory fits (32 rows of
  // 8192). Longer vectors go through in pieces.
  static constexpr int64_t kLeastCapacity = 1 << 18;

  // A rank's own part of the shared memory, and all of it: the ranks' parts, then the node's sum.
  static int64_t part_bytes(int64_t capacity) { return 4096 + 2 * 4 * capacity; }
  static int64_t memory_bytes(int ranks, int64_t capacity) { return ranks * part_bytes(capacity) + 4 * capacity; }

  // `memory`, `capacity`: see `move`. `inter_node` is empty on one node.
  AllReduce(char* memory, int64_t capacity, int rank, int ranks, bool bf16, bool nodes, InterNode inter_node);

  // On to other memory, between two exchanges, the same two on all ranks: zeroed, memory_bytes(ranks, capacity), mapped
  // by all `ranks` of this node. `capacity` fills whole pages and is not below the last one, which recorded steps rely on.
  void move(char* memory, int64_t capacity);

  bool bf16() const { return bf16_; }
  int64_t capacity() const { return capacity_; }
  // Where this rank's next partial sums go.
  void* slot() const { return slot(rank_); }

  // Every worker calls it, after a barrier that ends the writing of n numbers to slot(). The parts hold until the
  // next exchange. `own`: another place where this rank's numbers lie, the same bits as in its slot, to read them from.
  const Parts& exchange(const Worker& w, const KernelTable& kernels, int64_t n, const void* own = nullptr);

  // y[n] = sum over ranks, for any n. Every worker calls it.
  void sum(const Worker& w, const KernelTable& kernels, float* y, int64_t n);

  // For statistics and deadlines; the last two from any thread.
  int64_t count() const { return count_.load(std::memory_order_relaxed); }
  int64_t waited_ns() const { return waited_ns_; }
  // How long this rank has been waiting, 0 when it is not, and the ranks of the node that have not come.
  std::pair<double, std::vector<int>> waiting() const;

 private:
  // One cache line that only its rank writes: how far it has come.
  struct alignas(64) Flag {
    std::atomic<uint64_t> stage;
  };
  // An exchange has three meeting points; a flag counts all of them.
  enum Point { kSlotsWritten = 1, kPiecesSummed = 2, kNodesSummed = 3 };

  char* part(int rank) const { return memory_ + rank * part_bytes(capacity_); }
  Flag& flag(int rank) const { return *reinterpret_cast<Flag*>(part(rank)); }
  void* slot(int rank) const { return part(rank) + 4096 + turn_ * 4 * capacity_; }
  void arrive(Point point);
  bool has_arrived(int rank, uint64_t stage) const;
  void wait_for(int first, int last, Point point, int spins);
  void between_nodes(void* data, int64_t n);
  // y[n] into the slot.
  void put(const Worker& w, const KernelTable& kernels, const float* y, int64_t n) const;
  void sum_piece(const Worker& w, const KernelTable& kernels, int64_t n) const;

  char* memory_;
  int64_t capacity_;
  int rank_, ranks_;
  bool bf16_, nodes_;
  InterNode inter_node_;
  int turn_ = 0;                    // which of the two slots is next
  std::vector<const void*> slots_;  // of all ranks, in this exchange
  void* node_sum_;                  // behind the ranks' parts
  Parts parts_{};
  int64_t waited_ns_ = 0;
  std::atomic<int64_t> count_{0};  // exchanges begun
  std::atomic<uint64_t> awaited_{0};
  std::atomic<int64_t> waiting_since_ns_{0};
};

}  // namespace distinf
