// Reads memory as the GEMMs do: one contiguous run, whole vectors, with or without software prefetch. Returns something
// that depends on all of it, so that no load can be dropped.

template <bool kPrefetch>
inline int32_t read_lines(const uint8_t* p, int64_t lines) {
  constexpr int64_t kAhead = 6144;  // 4-8 KiB ahead is where a core's rate peaks on the machines measured (perf/LOG.md)
  constexpr int kUnroll = 256 / (4 * kLanes);  // four cache lines a turn
  Whole acc[kUnroll];
  for (Whole& a : acc) a = zero_whole();
  int64_t line = 0;
  for (; line + 4 <= lines; line += 4, p += 256) {
    for (int i = 0; kPrefetch && i < 4; i++) __builtin_prefetch(p + kAhead + i * 64, 0, 2);
    for (int i = 0; i < kUnroll; i++) acc[i] = add_whole(acc[i], load_bytes(p + i * 4 * kLanes));
  }
  Whole total = zero_whole();
  for (const Whole& a : acc) total = add_whole(total, a);
  return static_cast<int32_t>(sum(to_vec(total)));
}

int32_t read_stream(const Worker& w, const void* data, int64_t bytes, bool prefetch) {
  const int64_t lines = bytes / 64, first = w.begin(lines), count = w.end(lines) - first;
  const auto* p = static_cast<const uint8_t*>(data) + first * 64;
  return prefetch ? read_lines<true>(p, count) : read_lines<false>(p, count);
}
