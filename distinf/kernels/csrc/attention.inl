// Causal attention over the paged cache, one task per row and query head.
// Online softmax: Milakov and Gimelshein, arXiv 1805.02867.

inline float dot(const float* q, const bf16* k, int64_t n) {
  Vec acc = zero();
  for (int64_t i = 0; i < n; i += kLanes) acc = fma(load_n(q, i, n), load_n(k, i, n), acc);
  return sum(acc);
}

// out = out * scale + weight * v
inline void accumulate(float* out, float scale, float weight, const bf16* v, int64_t n) {
  const Vec s = broadcast(scale), w = broadcast(weight);
  for (int64_t i = 0; i < n; i += kLanes) store_n(out, fma(w, load_n(v, i, n), mul(s, load_n(out, i, n))), i, n);
}

struct Softmax {
  float max = -INFINITY, sum = 0;

  // Takes one score in; returns the factor for what was summed before, and the score's weight.
  inline std::pair<float, float> push(float score) {
    const float peak = std::max(max, score);
    const float keep = std::exp(max - peak), weight = std::exp(score - peak);
    sum = sum * keep + weight;
    max = peak;
    return {keep, weight};
  }
};

inline void attend_row_head(const AttentionArgs& args, const CacheArgs& cache, const BatchArgs& batch, int64_t row,
                            int64_t head) {
  const int64_t d = cache.head_dim;
  const int64_t kv_head = (args.group_offset + head) / args.group;
  const bf16* q_in = args.q + row * args.q_stride + head * d;
  float q[kMaxHeadDim], acc[kMaxHeadDim];
  for (int64_t i = 0; i < d; i += kLanes) {
    store_n(q, mul(load_n(q_in, i, d), broadcast(args.scale)), i, d);
    store_n(acc, zero(), i, d);
  }
  Softmax softmax;
  const int64_t last = batch.positions[row];
  const int64_t first = args.window ? std::max<int64_t>(0, last - args.window + 1) : 0;
  for (int64_t position = first; position <= last; position++) {
    const int64_t at = cache_offset(cache, batch, batch.sequence[row], position, kv_head);
    const auto [keep, weight] = softmax.push(dot(q, cache.k + at, d));
    accumulate(acc, keep, weight, cache.v + at, d);
  }
  const Vec inverse = broadcast(1 / softmax.sum);
  bf16* out = args.out + (row * args.q_heads + head) * d;
  for (int64_t i = 0; i < d; i += kLanes) store_n(out, mul(load_n(acc, i, d), inverse), i, d);
}

void attention(const Worker& w, const AttentionArgs& args, const CacheArgs& cache, const BatchArgs& batch) {
  // Late rows of a prompt see more keys: workers take rows in turn, not in runs, so that their work is alike.
  for (int64_t i = w.index; i < batch.rows * args.q_heads; i += w.count) {
    attend_row_head(args, cache, batch, i / args.q_heads, i % args.q_heads);
  }
}
