// Rotation, embedding and KV append over the Vec of the including instruction set.

// Up to kLanes elements through a buffer: the ends of rows that are no whole vector.
template <class T>
inline Vec load_part(const T* p, int64_t n) {
  float buffer[kLanes] = {};
  for (int64_t i = 0; i < n; i++) buffer[i] = to_float(p[i]);
  return load(buffer);
}

template <class T>
inline void store_part(T* p, Vec v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  for (int64_t i = 0; i < n; i++) p[i] = buffer[i];
}

// Vector at offset i of a row of n elements, whole or its last part.
template <class T>
inline Vec load_n(const T* p, int64_t i, int64_t n) {
  return i + kLanes <= n ? load(p + i) : load_part(p + i, n - i);
}
template <class T>
inline void store_n(T* p, Vec v, int64_t i, int64_t n) {
  i + kLanes <= n ? store(p + i, v) : store_part(p + i, v, n - i);
}

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, then a degree-6 polynomial for e^r (truncation error 2e-8 relative,
// below half an fp32 ulp), scaled by 2^n. Below -87.3 the result would be subnormal and is 2^-126.
inline Vec exp(Vec x) {
  x = min(broadcast(88.3f), max(broadcast(-87.3f), x));  // x second: both give it back when it is NaN
  const Vec n = round(mul(x, broadcast(1.44269504f)));
  Vec r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.0f / 720);
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return mul(p, exp2_whole(n));
}

// tanh x = 1 - 2 / (1 + e^(2 x)), to within an ulp of 1
inline Vec tanh(Vec x) { return sub(broadcast(1.0f), div(broadcast(2.0f), add(broadcast(1.0f), exp(add(x, x))))); }

// cap tanh(x / cap)
inline Vec soft_capped(Vec x, float cap) { return mul(broadcast(cap), tanh(mul(x, broadcast(1 / cap)))); }

void rope(const Worker& w, bf16* x, int64_t stride, const float* cos, const float* sin, int64_t rows, int64_t heads,
          int64_t head_dim, int64_t half) {
  for (int64_t i = w.begin(rows * heads); i < w.end(rows * heads); i++) {
    const int64_t row = i / heads;
    bf16* first = x + row * stride + i % heads * head_dim;
    bf16* second = first + half;
    for (int64_t d = 0; d < half; d += kLanes) {
      const Vec a = load_n(first, d, half), b = load_n(second, d, half);
      const Vec c = load_n(cos + row * half, d, half), s = load_n(sin + row * half, d, half);
      store_n(first, sub(mul(a, c), mul(b, s)), d, half);
      store_n(second, fma(b, c, mul(a, s)), d, half);
    }
  }
}

// Place of a position's vector among all vectors of the cache: times head_dim, an offset into k and v.
inline int64_t cache_place(const CacheArgs& cache, const BatchArgs& batch, int64_t sequence, int64_t position,
                           int64_t head) {
  const int64_t block = batch.block_table[sequence * batch.max_blocks + position / kBlockSize];
  return (block * cache.kv_heads + head) * kBlockSize + position % kBlockSize;
}

// Symmetric, the largest magnitude at 127. A vector of zeros gets the scale 1: 0 / 0 would not be 0.
inline void quantise(const bf16* x, int64_t n, int8_t* out, float* scale) {
  Vec peak = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load_n(x, i, n);
    peak = max(peak, max(v, sub(zero(), v)));
  }
  *scale = largest(peak) > 0 ? largest(peak) / 127 : 1;
  for (int64_t i = 0; i < n; i += kLanes) store_n(out, div(load_n(x, i, n), broadcast(*scale)), i, n);
}

void kv_append(const Worker& w, const bf16* k, const bf16* v, int64_t stride, const CacheArgs& cache,
               const BatchArgs& batch) {
  const int64_t items = batch.rows * cache.kv_heads, d = cache.head_dim;
  for (int64_t i = w.begin(items); i < w.end(items); i++) {
    const int64_t row = i / cache.kv_heads, head = i % cache.kv_heads;
    const int64_t to = cache_place(cache, batch, batch.sequence[row], batch.positions[row], head);
    const int64_t from = row * stride + head * d;
    if (cache.k_scale) {
      quantise(k + from, d, static_cast<int8_t*>(cache.k) + to * d, cache.k_scale + to);
      quantise(v + from, d, static_cast<int8_t*>(cache.v) + to * d, cache.v_scale + to);
    } else {
      std::memcpy(static_cast<bf16*>(cache.k) + to * d, k + from, d * sizeof(bf16));
      std::memcpy(static_cast<bf16*>(cache.v) + to * d, v + from, d * sizeof(bf16));
    }
  }
}

void embedding(const Worker& w, const int32_t* ids, const bf16* table, float scale, float* out, int64_t rows,
               int64_t n) {
  for (int64_t row = w.begin(rows); row < w.end(rows); row++) {
    const bf16* from = table + static_cast<int64_t>(ids[row]) * n;
    for (int64_t i = 0; i < n; i += kLanes) store_n(out + row * n, mul(load_n(from, i, n), broadcast(scale)), i, n);
  }
}
