// The soft cap, and sums into the residual stream.

// Whole vectors of n elements for each worker, so that only the last one meets the end of the row.
template <class Use>
inline void each_vector(const Worker& w, int64_t n, Use use) {
  const int64_t vectors = (n + kLanes - 1) / kLanes;
  for (int64_t i = w.begin(vectors) * kLanes; i < std::min(w.end(vectors) * kLanes, n); i += kLanes) use(i);
}

void softcap(const Worker& w, float* x, int64_t n, float cap) {
  each_vector(w, n, [&](int64_t i) { store_n(x, soft_capped(load_n(x, i, n), cap), i, n); });
}

template <class T>
inline void add_to(const Worker& w, float* x, const T* y, int64_t n) {
  each_vector(w, n, [&](int64_t i) { store_n(x, add(load_n(x, i, n), load_n(y, i, n)), i, n); });
}

void add_rows(const Worker& w, float* x, const void* y, bool fp32, int64_t n) {
  fp32 ? add_to(w, x, static_cast<const float*>(y), n) : add_to(w, x, static_cast<const bf16*>(y), n);
}
