// What the experts of a token have computed, put together: out[n] = sum of weights[i] * y[place[i], n], plus `plus`
// times the sigmoid of `gate`, where they are given.
void expert_sum(const Worker& w, const ExpertSumArgs& args) {
  const int32_t first = *args.first, end = *args.end;
  for (int64_t row = 0; row < args.rows; row++) {
    const float* weights = args.weights + row * args.top_k;
    const int32_t* place = args.place + row * args.top_k;
    const float share = args.gate ? 1 / (1 + std::exp(-args.gate[row])) : 1;
    each_vector(w, args.n, [&](int64_t i) {
      Vec total = args.plus ? mul(load_n(args.plus + row * args.n, i, args.n), broadcast(share)) : zero();
      for (int64_t k = 0; k < args.top_k; k++) {
        if (place[k] < first || place[k] >= end) continue;
        total = fma(load_n(args.y + place[k] * args.n, i, args.n), broadcast(weights[k]), total);
      }
      store_n(args.out + row * args.n, total, i, args.n);
    });
  }
}
