// Memory for packed weights: large anonymous mappings on 2 MiB pages, filled front to back, freed together.
#pragma once
#include <cstddef>
#include <vector>

namespace distinf {

class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Zeroed memory at a 4 KiB boundary, not yet touched: the thread that writes it first places it.
  // Throws std::bad_alloc.
  void* allocate(size_t bytes);

 private:
  struct Chunk {
    void* base;
    size_t size;
  };
  // A 2 MiB page is all or nothing: chunks of 32 pages keep the untouched end of the last one small.
  static constexpr size_t kHugePage = 2u << 20;
  static constexpr size_t kChunk = 32 * kHugePage;

  std::vector<Chunk> chunks_;
  size_t offset_ = 0;  // into the last chunk
};

}  // namespace distinf
