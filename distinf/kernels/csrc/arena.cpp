#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>

namespace distinf {
namespace {

constexpr size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// mmap aligns to 4 KiB only: map one huge page more and give the ends back.
void* map_huge(size_t size, size_t huge_page) {
  void* raw = mmap(nullptr, size + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const auto start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t base = round_up(start, huge_page);
  if (base > start) munmap(raw, base - start);
  const size_t tail = start + huge_page - base;
  if (tail) munmap(reinterpret_cast<void*>(base + size), tail);
  madvise(reinterpret_cast<void*>(base), size, MADV_HUGEPAGE);  // a refusal costs speed only
  return reinterpret_cast<void*>(base);
}

}  // namespace

Arena::~Arena() {
  for (const Chunk& chunk : chunks_) munmap(chunk.base, chunk.size);
}

void* Arena::allocate(size_t bytes) {
  const size_t size = round_up(std::max<size_t>(bytes, 1), 4096);
  if (chunks_.empty() || offset_ + size > chunks_.back().size) {
    const size_t chunk = std::max(kChunk, round_up(size, kHugePage));
    chunks_.push_back({map_huge(chunk, kHugePage), chunk});
    offset_ = 0;
  }
  void* p = static_cast<char*>(chunks_.back().base) + offset_;
  offset_ += size;
  return p;
}

}  // namespace distinf
