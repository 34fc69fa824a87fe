// Quantises rows of x (see activations.h) with the Vec of the including instruction set.

inline float largest_magnitude(const bf16* x, int64_t n) {
  Vec most = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load_n(x, i, n);
    most = max(most, max(v, sub(zero(), v)));
  }
  float lanes[kLanes], result = 0;
  store(lanes, most);
  for (float lane : lanes) result = std::max(result, lane);
  return result;
}

inline void quantise_row(const LinearArgs& args, const QuantisedRows& q, int64_t row) {
  const Weight& w = args.w;
  const bf16* x = args.x + row * args.x_stride;
  // Two digits reach from -128 * 127 - 64 to 128 * 127 + 63; 16256 = 128 * 127 leaves the low one its room.
  const float range = w.digits == 1 ? 127.0f : 16256.0f;
  const float most = largest_magnitude(x, w.k);
  const float inverse = most > 0 ? range / most : 0;
  q.scales[row] = most / range;
  int8_t *first = q.digits + row * w.digits * q.k_padded, *second = first + q.k_padded;
  // A last part of a vector writes into the padding: k_padded is whole vectors.
  for (int64_t i = 0; i < w.k; i += kLanes) {
    const Whole whole = to_whole(mul(load_n(x, i, w.k), broadcast(inverse)));
    if (w.digits == 1) {
      store_bytes(first + i, whole);
    } else {
      const Whole high = shift_right<7>(add_whole(whole, broadcast_whole(64)));  // the low digit is in [-64, 63]
      store_bytes(first + i, high);
      store_bytes(second + i, sub_whole(whole, shift_left<7>(high)));
    }
  }
  for (int d = 0; d < w.digits; d++) {
    int8_t* digits = first + d * q.k_padded;
    std::memset(digits + w.k, 0, q.k_padded - w.k);
    for (int64_t group = 0; group < q.groups; group++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < w.group_rows(); i++) sum += digits[group * w.group_rows() + i];
      q.sums[(row * q.groups + group) * w.digits + d] = sum;
    }
  }
}

// This worker's view of all rows of x, quantised.
inline QuantisedRows quantise(const Worker& w, const LinearArgs& args) {
  const bool own = args.m <= kPrivateRows;
  char* memory = args.scratch + (own ? w.index * quantised_rows_bytes(args.w, args.m) : 0);
  const QuantisedRows q = quantised_rows(args.w, args.m, memory);
  const int64_t first = own ? 0 : w.begin(args.m), last = own ? args.m : w.end(args.m);
  for (int64_t row = first; row < last; row++) quantise_row(args, q, row);
  if (!own) w.barrier();
  return q;
}
