// Causal attention over the paged cache. The queries of a sequence that share a KV head (rows x heads of the group)
// are cut into tiles, and a tile meets its keys one cache block at a time with a running softmax (FlashAttention, Dao
// et al., arXiv 2205.14135). The blocks of all tiles form one line and each thread takes an equal stretch of it, so
// that a prompt and the long history of one token are divided alike (Stream-K, Osama et al., arXiv 2301.03598). A
// tile that the end of a stretch cuts leaves partial sums, which are merged after a barrier.

// Accumulators kQueries x kColumns, with the columns' vectors and a broadcast, fill most of 32 registers (AVX-512)
// or 16 (AVX2).
constexpr int kQueries = 4;
constexpr int kColumns = kLanes == 16 ? 4 : 2;

// What it costs to bring a block in and to turn its keys, in queries' worth of arithmetic on the block.
constexpr int64_t kBlockCost = 4;

struct Span {
  int64_t begin, end;
};

// Queries first .. first + count of a sequence and KV head. Query i is head i % heads of row i / heads.
struct Tile {
  int64_t row, sequence;         // first row of the sequence
  int64_t kv_head, head, heads;  // local query heads of the KV head
  int64_t first, count;
  Span blocks;   // blocks of the sequence that any of the queries sees
  int64_t cost;  // of all tiles before this one

  int64_t row_of(int64_t query) const { return row + (first + query) / heads; }
  int64_t head_of(int64_t query) const { return head + (first + query) % heads; }
  int64_t block_cost() const { return count + kBlockCost; }
  int64_t end_cost() const { return cost + (blocks.end - blocks.begin) * block_cost(); }
};

// Positions that a row sees: its own and those before it, as far as the window reaches.
inline Span seen_by(const AttentionArgs& args, const BatchArgs& batch, int64_t row) {
  const int64_t end = batch.positions[row] + 1;
  return {args.window ? std::max<int64_t>(0, end - args.window) : 0, end};
}

// Tiles of one KV head and the rows [row, end) of one sequence.
template <class Use>
inline void tiles_of_head(const AttentionArgs& args, const BatchArgs& batch, int64_t row, int64_t end, int64_t kv_head,
                          int64_t* cost, Use use) {
  const int64_t head = std::max<int64_t>(0, kv_head * args.group - args.group_offset);
  const int64_t heads = std::min(args.q_heads, (kv_head + 1) * args.group - args.group_offset) - head;
  const int64_t queries = (end - row) * heads;
  for (int64_t first = 0; first < queries; first += kTileQueries) {
    Tile tile{row,  batch.sequence[row], kv_head, head, heads, first, std::min(kTileQueries, queries - first), {},
              *cost};
    // Rows are in order: the first one sees the earliest key and the last one the latest.
    tile.blocks.begin = seen_by(args, batch, tile.row_of(0)).begin / kBlockSize;
    tile.blocks.end = (seen_by(args, batch, tile.row_of(tile.count - 1)).end + kBlockSize - 1) / kBlockSize;
    *cost = tile.end_cost();
    use(tile);
  }
}

// Every tile of the step, in the same order on every thread; returns their cost.
template <class Use>
inline int64_t for_each_tile(const AttentionArgs& args, const CacheArgs& cache, const BatchArgs& batch, Use use) {
  int64_t cost = 0;
  for (int64_t row = 0, end; row < batch.rows; row = end) {
    end = row + 1;
    while (end < batch.rows && batch.sequence[end] == batch.sequence[row]) end++;
    for (int64_t kv_head = 0; kv_head < cache.kv_heads; kv_head++) {
      tiles_of_head(args, batch, row, end, kv_head, &cost, use);
    }
  }
  return cost;
}

// Blocks of a tile that thread `index` of `count` works on: those whose start lies on its stretch of the line.
inline Span share_of(const Tile& tile, int64_t total, int64_t index, int64_t count) {
  const auto block_at = [&](int64_t cost) {
    const int64_t ahead = (cost - tile.cost + tile.block_cost() - 1) / tile.block_cost();
    return std::clamp(tile.blocks.begin + ahead, tile.blocks.begin, tile.blocks.end);
  };
  return {block_at(total * index / count), block_at(total * (index + 1) / count)};
}

// Asks for a position's vector of the block to come. A block of one head is too short for the hardware to see it
// coming, and asked for all at once it would hold the loads up: one vector at a time, between the arithmetic.
template <class T>
struct AskFor {
  const T* rows;
  int64_t d;
  void operator()(int64_t key) const {
    const auto* row = reinterpret_cast<const char*>(rows + key * d);
    for (int64_t i = 0; i < d * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(row + i, 0, 2);
  }
};
struct AskNothing {
  void operator()(int64_t) const {}
};

// Rows of kLanes keys to pairs of elements: out[i / 2][key][2] = k[key][i], k[key][i + 1].
inline void turn_keys(const bf16* k, int64_t d, bf16* out) {
  constexpr int64_t kNext = 2 * kBlockSize;  // from one pair of elements to the next
  int64_t i = 0;
  for (; i + 8 <= d; i += 8) {
    Pairs rows[4];  // 128-bit lane L of rows[j]: four pairs of key 4 L + j
    for (int j = 0; j < 4; j++) rows[j] = load_quads(k + j * d + i, 4 * d);
    const Pairs low01 = zip_low(rows[0], rows[1]), low23 = zip_low(rows[2], rows[3]);
    const Pairs high01 = zip_high(rows[0], rows[1]), high23 = zip_high(rows[2], rows[3]);
    bf16* to = out + i / 2 * kNext;
    store_pairs(to, zip_low_two(low01, low23));
    store_pairs(to + kNext, zip_high_two(low01, low23));
    store_pairs(to + 2 * kNext, zip_low_two(high01, high23));
    store_pairs(to + 3 * kNext, zip_high_two(high01, high23));
  }
  for (; i < d; i++) {
    for (int key = 0; key < kLanes; key++) out[i / 2 * kNext + 2 * key + i % 2] = k[key * d + i];
  }
}

// int8 is exact in bf16, so its scale can wait for the finished score.
inline const bf16* as_bf16(const bf16* k, int64_t, AttentionScratch&) { return k; }
inline const bf16* as_bf16(const int8_t* k, int64_t n, AttentionScratch& s) {
  for (int64_t i = 0; i < n; i += kLanes) store(s.k_rows + i, load(k + i));
  return s.k_rows;
}

// The pairs of a block's first keys, as many whole vectors as hold the last key that a query sees. Zeros behind the
// last elements make whole AMX tiles.
template <class T, class Ask>
inline void load_keys(const T* k, int64_t d, int64_t keys, AttentionScratch& s, Ask ask) {
  const bf16* rows = as_bf16(k, round_up(keys, kLanes) * d, s);
  const int64_t whole = d / 2 * 2;
  std::fill_n(s.k_pairs + whole * kBlockSize, (round_up(d, kDepth) - whole) * kBlockSize, bf16{0});
  for (int64_t key = 0; key < keys; key += kLanes) {
    for (int i = 0; i < kLanes; i++) ask(key + i);
    turn_keys(rows + key * d, d, s.k_pairs + 2 * key);
  }
}

// scores[R][kBlockSize] = q[R][2 * pairs] . keys, times each key's scale
template <int R>
inline void score(const bf16* q, int64_t stride, int64_t pairs, const AttentionScratch& s,
                  float (*scores)[kBlockSize]) {
  for (int64_t key = 0; key < kBlockSize; key += kColumns * kLanes) {
    Vec acc[R][kColumns];
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < kColumns; c++) acc[r][c] = zero();
    }
    for (int64_t p = 0; p < pairs; p++) {
      Pairs k[kColumns];
      for (int c = 0; c < kColumns; c++) k[c] = load_pairs(s.k_pairs + 2 * (p * kBlockSize + key + c * kLanes));
      for (int r = 0; r < R; r++) {
        const Pairs x = broadcast_pair(q + r * stride + 2 * p);
        for (int c = 0; c < kColumns; c++) acc[r][c] = dot_pairs(acc[r][c], x, k[c]);
      }
    }
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < kColumns; c++) {
        const int64_t at = key + c * kLanes;
        store(scores[r] + at, mul(acc[r][c], load(s.k_scale + at)));
      }
    }
  }
}

// Scores of a block become weights e^(score - peak), times the values' scales; what a query does not see weighs 0.
// Takes the largest score before the block, returns the largest now.
inline float weigh(float* scores, Span seen, float peak_before, const float* v_scale, float* total) {
  *total = 0;
  if (seen.begin >= seen.end) {
    std::fill_n(scores, kBlockSize, 0.0f);
    return peak_before;
  }
  std::fill(scores, scores + seen.begin, -INFINITY);
  std::fill(scores + seen.end, scores + kBlockSize, -INFINITY);
  Vec peaks = broadcast(peak_before), weights = zero();
  for (int64_t i = 0; i < kBlockSize; i += kLanes) peaks = max(peaks, load(scores + i));
  const float peak = largest(peaks);
  for (int64_t i = 0; i < kBlockSize; i += kLanes) {
    const Vec weight = exp(sub(load(scores + i), broadcast(peak)));
    weights = add(weights, weight);  // 2^-126 of a hidden key is nothing beside the 1 of the largest
    store(scores + i, mul(weight, load(v_scale + i)));
  }
  std::fill(scores, scores + seen.begin, 0.0f);
  std::fill(scores + seen.end, scores + kBlockSize, 0.0f);
  *total = sum(weights);
  return peak;
}

inline void cap_scores(float* scores, float cap) {
  for (int64_t i = 0; i < kBlockSize; i += kLanes) store(scores + i, soft_capped(load(scores + i), cap));
}

// scores[key] += slope * its distance from the query, which is not above 0 where the query sees the key
inline void add_distances(float* scores, float slope, int64_t first_distance) {
  const int32_t first = static_cast<int32_t>(first_distance);
  for (int32_t i = 0; i < kBlockSize; i++) scores[i] += slope * static_cast<float>(first + i);
}

// acc[R] = acc * keep + weights . values over some keys of a block, C vectors of columns at once. Several are whole:
// a test for the end of the row in the inner loop would keep them out of registers.
template <int R, int C, class T, class Ask>
inline void add_values(const float (*weights)[kBlockSize], Span keys, const float* keep, const T* v, int64_t d,
                       int64_t column, float* acc, int64_t stride, Ask ask) {
  Vec sums[R][C];
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) sums[r][c] = mul(load(acc + r * stride + column + c * kLanes), broadcast(keep[r]));
  }
  for (int64_t key = keys.begin; key < keys.end; key++) {
    ask(key);
    Vec x[C];
    for (int c = 0; c < C; c++) {
      const T* from = v + key * d;
      x[c] = C > 1 ? load(from + column + c * kLanes) : load_n(from, column, d);
    }
    for (int r = 0; r < R; r++) {
      const Vec weight = broadcast(weights[r][key]);
      for (int c = 0; c < C; c++) sums[r][c] = fma(weight, x[c], sums[r][c]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) store(acc + r * stride + column + c * kLanes, sums[r][c]);
  }
}

// A block's keys and values of one head.
template <class T>
struct Block {
  const T *k, *v;
  int64_t first, d;  // position of its first key
  AskFor<T> next_k, next_v;

  // Which of its keys a query sees that sees these positions.
  int64_t at(int64_t position) const { return std::clamp<int64_t>(position - first, 0, kBlockSize); }
};

// Keys of the block that any of the queries [query, query + count) sees: the first one sees the earliest.
template <class T>
inline Span seen_by_any(const AttentionScratch& s, const Block<T>& block, int64_t query, int64_t count) {
  return {block.at(s.first_key[query]), block.at(s.end_key[query + count - 1])};
}

// Scores of queries [query, query + count), at most kLanes, become weights, and their sums take them in. keep[kLanes]:
// what is left of the weights of the blocks before.
template <class T>
inline void weigh_queries(const AttentionScratch& s, const Block<T>& block, int64_t query, int64_t count,
                          float (*scores)[kBlockSize], float* keep, Partial& part) {
  alignas(64) float drop[kLanes] = {};
  float totals[kLanes];
  for (int64_t r = 0; r < count; r++) {
    if (s.softcap) cap_scores(scores[r], s.softcap);
    if (s.slopes) add_distances(scores[r], s.slope[query + r], block.first - (s.end_key[query + r] - 1));
    const Span seen{block.at(s.first_key[query + r]), block.at(s.end_key[query + r])};
    const float peak = weigh(scores[r], seen, part.max[query + r], s.v_scale, &totals[r]);
    drop[r] = part.max[query + r] - peak;
    part.max[query + r] = peak;
  }
  store(keep, exp(load(drop)));
  for (int64_t r = 0; r < count; r++) part.sum[query + r] = part.sum[query + r] * keep[r] + totals[r];
}

// Queries [query, query + R) of the tile take in one block.
template <int R, class T, class Ask>
inline void attend_queries(const AttentionScratch& s, const Block<T>& block, int64_t query, Partial& part, Ask ask) {
  const Span any = seen_by_any(s, block, query, R);
  if (any.begin >= any.end) return;
  const int64_t d = block.d, stride = query_stride(d);
  alignas(64) float scores[R][kBlockSize], keep[kLanes];
  score<R>(s.q + query * stride, stride, (d + 1) / 2, s, scores);
  weigh_queries(s, block, query, R, scores, keep, part);
  float* acc = part.acc + query * stride;
  int64_t i = 0;
  for (; i + kColumns * kLanes <= d; i += kColumns * kLanes) {
    i ? add_values<R, kColumns>(scores, any, keep, block.v, d, i, acc, stride, AskNothing{})
      : add_values<R, kColumns>(scores, any, keep, block.v, d, i, acc, stride, ask);
  }
  for (; i < d; i += kLanes) add_values<R, 1>(scores, any, keep, block.v, d, i, acc, stride, AskNothing{});
}

// The last queries of a tile may be fewer than R.
template <int R, class T, class Ask>
inline void attend_up_to(const AttentionScratch& s, const Block<T>& block, int64_t query, int64_t count, Partial& part,
                         Ask ask) {
  if constexpr (R > 1) {
    if (count < R) return attend_up_to<R - 1>(s, block, query, count, part, ask);
  }
  attend_queries<R>(s, block, query, part, ask);
}

// How the first `count` queries take in a block. attention_amx.cpp has another way.
struct ByVectors {
  template <class T>
  static void take_in(const Block<T>& block, int64_t count, AttentionScratch& s, Partial& part) {
    attend_up_to<kQueries>(s, block, 0, count, part, block.next_k);
    for (int64_t query = kQueries; query < count; query += kQueries) {
      attend_up_to<kQueries>(s, block, query, count - query, part, AskNothing{});
    }
  }
};

template <class T>
inline Block<T> block_at(const CacheArgs& cache, const BatchArgs& batch, const Tile& tile, int64_t index) {
  const int64_t d = cache.head_dim;
  const auto offset = [&](int64_t i) {
    return cache_place(cache, batch, tile.sequence, i * kBlockSize, tile.kv_head) * d;
  };
  const auto *k = static_cast<const T*>(cache.k), *v = static_cast<const T*>(cache.v);
  const int64_t here = offset(index), next = offset(std::min(index + 1, tile.blocks.end - 1));
  return {k + here, v + here, index * kBlockSize, d, {k + next, d}, {v + next, d}};
}

// All queries of the tile take in one block.
template <class Way, class T>
inline void attend_block(const AttentionArgs& args, const CacheArgs& cache, const Block<T>& block, const Tile& tile,
                         AttentionScratch& s, Partial& part) {
  load_keys(block.k, block.d, block.at(s.end_key[tile.count - 1]), s, block.next_v);
  const int64_t place = (block.k - static_cast<const T*>(cache.k)) / block.d;
  for (int64_t i = 0; i < kBlockSize; i++) {
    s.k_scale[i] = cache.k_scale ? args.scale * cache.k_scale[place + i] : args.scale;
    s.v_scale[i] = cache.v_scale ? cache.v_scale[place + i] : 1.0f;
  }
  Way::take_in(block, tile.count, s, part);
}

// The tile's queries side by side, what each sees, and empty sums. The padding of a query is zero.
inline void start_tile(const AttentionArgs& args, const BatchArgs& batch, const Tile& tile, int64_t d,
                       AttentionScratch& s, Partial& part) {
  const int64_t stride = query_stride(d);
  s.softcap = args.softcap;
  s.slopes = args.slopes != nullptr;
  for (int64_t i = 0; i < tile.count; i++) {
    const int64_t row = tile.row_of(i);
    const Span seen = seen_by(args, batch, row);
    s.first_key[i] = seen.begin;
    s.end_key[i] = seen.end;
    s.slope[i] = args.slopes ? args.slopes[tile.head_of(i)] : 0;
    std::copy_n(args.q + row * args.q_stride + tile.head_of(i) * d, d, s.q + i * stride);
    std::fill_n(s.q + i * stride + d, stride - d, bf16{0});
    part.max[i] = std::numeric_limits<float>::lowest();  // finite: the difference of two is no NaN
    part.sum[i] = 0;
    std::fill_n(part.acc + i * stride, stride, 0.0f);
  }
}

inline void write_query(const AttentionArgs& args, const Tile& tile, int64_t query, const Partial& part, int64_t d) {
  const float* acc = part.acc + query * query_stride(d);
  bf16* out = args.out + (tile.row_of(query) * args.q_heads + tile.head_of(query)) * d;
  const Vec inverse = broadcast(1 / part.sum[query]);
  for (int64_t i = 0; i < d; i += kLanes) store_n(out, mul(load(acc + i), inverse), i, d);
}

template <class Way, class T>
inline void attend_tile(const AttentionArgs& args, const CacheArgs& cache, const BatchArgs& batch, const Tile& tile,
                        Span blocks, AttentionScratch& s) {
  Partial& part = blocks.begin > tile.blocks.begin ? s.begun_before : s.own;
  start_tile(args, batch, tile, cache.head_dim, s, part);
  for (int64_t block = blocks.begin; block < blocks.end; block++) {
    attend_block<Way>(args, cache, block_at<T>(cache, batch, tile, block), tile, s, part);
  }
  if (blocks.begin > tile.blocks.begin || blocks.end < tile.blocks.end) return;  // merged after the barrier
  for (int64_t i = 0; i < tile.count; i++) write_query(args, tile, i, part, cache.head_dim);
}

inline void merge_query(Partial& into, const Partial& from, int64_t query, int64_t d) {
  const int64_t stride = query_stride(d);
  const float peak = std::max(into.max[query], from.max[query]);
  const float keep = std::exp(into.max[query] - peak), take = std::exp(from.max[query] - peak);
  into.max[query] = peak;
  into.sum[query] = into.sum[query] * keep + from.sum[query] * take;
  for (int64_t i = query * stride; i < (query + 1) * stride; i += kLanes) {
    store(into.acc + i, fma(load(from.acc + i), broadcast(take), mul(load(into.acc + i), broadcast(keep))));
  }
}

// Merges what threads left of a tile that this one worked on but not alone; its threads divide the queries.
inline void merge_tile(const Worker& w, const AttentionArgs& args, const Tile& tile, int64_t total, int64_t d) {
  const auto share = [&](int64_t index) { return share_of(tile, total, index, w.count); };
  if (share(w.index).begin == share(w.index).end) return;
  int64_t first = w.index, last = w.index;
  while (share(first).begin > tile.blocks.begin) first--;
  while (share(last).end < tile.blocks.end) last++;
  if (first == last) return;
  const int64_t threads = last - first + 1, mine = w.index - first;
  Partial& sums = args.scratch[first].own;
  for (int64_t query = tile.count * mine / threads; query < tile.count * (mine + 1) / threads; query++) {
    for (int64_t other = first + 1; other <= last; other++) {
      if (share(other).begin == share(other).end) continue;
      merge_query(sums, args.scratch[other].begun_before, query, d);
    }
    write_query(args, tile, query, sums, d);
  }
}

template <class Way>
inline void attend_all(const Worker& w, const AttentionArgs& args, const CacheArgs& cache, const BatchArgs& batch) {
  const auto attend = cache.k_scale ? attend_tile<Way, int8_t> : attend_tile<Way, bf16>;
  const int64_t total = for_each_tile(args, cache, batch, [](const Tile&) {});
  for_each_tile(args, cache, batch, [&](const Tile& tile) {
    const Span blocks = share_of(tile, total, w.index, w.count);
    if (blocks.begin < blocks.end) attend(args, cache, batch, tile, blocks, args.scratch[w.index]);
  });
  w.barrier();
  for_each_tile(args, cache, batch, [&](const Tile& tile) { merge_tile(w, args, tile, total, cache.head_dim); });
}

void attention(const Worker& w, const AttentionArgs& args, const CacheArgs& cache, const BatchArgs& batch) {
  attend_all<ByVectors>(w, args, cache, batch);
}
