// Sums of ranks' partial results.

// Vector at offset i of the sum of all parts, in their order.
template <class T>
inline Vec load_sum(const Parts& parts, int64_t i, int64_t n) {
  Vec sum = load_n(static_cast<const T*>(parts.data[0]), i, n);
  for (int p = 1; p < parts.count; p++) sum = add(sum, load_n(static_cast<const T*>(parts.data[p]), i, n));
  return sum;
}

inline Vec load_sum(const Parts& parts, int64_t i, int64_t n) {
  return parts.bf16 ? load_sum<bf16>(parts, i, n) : load_sum<float>(parts, i, n);
}

void sum_parts(const Parts& parts, int64_t begin, int64_t end, void* out, bool out_bf16) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec sum = load_sum(parts, i, end);
    out_bf16 ? store_n(static_cast<bf16*>(out), sum, i, end) : store_n(static_cast<float*>(out), sum, i, end);
  }
}
