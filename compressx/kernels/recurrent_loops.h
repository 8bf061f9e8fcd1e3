// The inner loops of sparse products and recurrent cells, written once for vectors of kLanes floats; see isa.h.
//
// A tile is `vectors` * kLanes outputs and `n` steps. Outputs of a dense tile share their inputs: a step is one input, loaded
// once for all of them. In a scattered tile every output has an input of its own at each step.

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int IVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

template <int N, int I = 0, class Body>
INLINE void Each(const Body& f) {
  if constexpr (I < N) {
    f(Constant<I>{});
    Each<N, I + 1>(f);
  }
}

INLINE Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
INLINE void Store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
INLINE Vec Splat(float a) { return a - Vec{}; }

// True if none of n elements is NaN or infinite: v - v has no bits then.
INLINE bool Finite(const float* x, int64_t n) {
  IVec odd = {};
  int bits = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = Load(x + i);
    odd |= reinterpret_cast<IVec>(v - v);
  }
  for (; i < n; ++i) bits |= x[i] - x[i] != 0.f;
  for (int k = 0; k < kLanes; ++k) bits |= odd[k];
  return bits == 0;
}

// What steps add: products; where an input is not finite only those with weights that are not zero, for tiles hold zeros
// too, and 0 * NaN is NaN.
template <bool kFinite>
INLINE Vec Products(Vec v, Vec w) {
  if (kFinite) return v * w;
  const IVec live = (reinterpret_cast<IVec>(w) & 0x7FFFFFFF) != 0;
  return reinterpret_cast<Vec>(live & reinterpret_cast<IVec>(v * w));
}

template <int R, bool kFinite>
NOINLINE void TileTimes(const Matrix& m, const TileAt& t, const float* x, float* y) {
  Vec sum[R];
  Each<R>([&](auto r) { sum[r] = Vec{}; });
  const float* w = m.weights + t.weight;
  const uint16_t* from = m.columns + t.column;
  if (t.kind & kScattered) {
    for (int k = 0; k < t.n; ++k, w += R * kLanes, from += R * kLanes) {
      Each<R>([&](auto r) {
        Vec v;
        for (int i = 0; i < kLanes; ++i) v[i] = x[from[r * kLanes + i]];
        sum[r] += Products<kFinite>(v, Load(w + r * kLanes));
      });
    }
  } else {
    for (int k = 0; k < t.n; ++k, w += R * kLanes) {
      const Vec v = Splat(x[from[k]]);
      Each<R>([&](auto r) { sum[r] += Products<kFinite>(v, Load(w + r * kLanes)); });
    }
  }
  const int* to = m.outputs + t.output;
  if (t.kind & kContiguous) {
    Each<R>([&](auto r) { Store(y + *to + r * kLanes, Load(y + *to + r * kLanes) + sum[r]); });
  } else {
    Each<R>([&](auto r) {
      for (int i = 0; i < kLanes; ++i) y[to[r * kLanes + i]] += sum[r][i];
    });
  }
}

template <bool kFinite>
INLINE void AllTimes(const Matrix& m, const float* x, float* y) {
  for (int64_t i = 0; i < m.tiles; ++i) {
    const TileAt& t = m.tile[i];
    switch (t.vectors) {
      case 1: TileTimes<1, kFinite>(m, t, x, y); break;
      case 2: TileTimes<2, kFinite>(m, t, x, y); break;
      case 3: TileTimes<3, kFinite>(m, t, x, y); break;
      default: TileTimes<4, kFinite>(m, t, x, y); break;
    }
  }
}

// y += m x, for x of n elements
INLINE void Times(const Matrix& m, const float* x, int64_t n, float* y) {
  if (Finite(x, n)) {
    AllTimes<true>(m, x, y);
  } else {
    AllTimes<false>(m, x, y);
  }
}

// e^v to about one unit in the last place, for v clamped to where float32 is not denormal; infinite from 88.4 on, so that
// the sigmoid of -inf is 0. NaN stays NaN, for comparisons with it are false.
INLINE Vec Exp(Vec v) {
  const Vec low = Splat(-87.f), high = Splat(89.f);
  v = v < low ? low : v > high ? high : v;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  Vec n = v * 1.44269504f + magic;
  const IVec bits = reinterpret_cast<IVec>(n) - 0x4B400000;
  n -= magic;
  const Vec r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * reinterpret_cast<Vec>((bits + 127) << 23);
}

INLINE Vec Sigmoid(Vec v) { return 1.f / (1.f + Exp(-v)); }
INLINE Vec Tanh(Vec v) { return 1.f - 2.f / (1.f + Exp(v + v)); }

// One sequence, all steps; the state never leaves the scratch, which has room for whole vectors.
//   cells: kGruBefore, kGruAfter (gates z, r, h), kLstm (gates i, f, g, o)
NOINLINE void Sequence(const Recurrent& s, int64_t b, float* scratch) {
  const int64_t h = s.hidden, wide = (h + kLanes) / kLanes * kLanes + kLanes, gates = s.cell == kLstm ? 4 : 3;
  float *state = scratch, *cell = state + wide, *gated = cell + wide, *a = gated + wide;
  const int64_t joined = gates * h + 2 * kLanes;
  for (int64_t i = 0; i < 3 * wide; ++i) scratch[i] = 0.f;
  for (int64_t i = 0; i < h; ++i) state[i] = s.h0[b * h + i];
  if (s.cell == kLstm)
    for (int64_t i = 0; i < h; ++i) cell[i] = s.c0[b * h + i];
  for (int64_t t = 0; t < s.steps; ++t) {
    const float* x = s.x + (t * s.batch + b) * gates * h;
    float* y = s.y + (t * s.batch + b) * h;
    if (s.cell == kLstm) {
      for (int64_t i = 0; i < gates * h; ++i) a[i] = x[i];
      for (int64_t i = gates * h; i < joined; ++i) a[i] = 0.f;
      Times(s.first, state, h, a);
      for (int64_t i = 0; i < h; i += kLanes) {
        const Vec in = Sigmoid(Load(a + i)), forget = Sigmoid(Load(a + h + i)), g = Tanh(Load(a + 2 * h + i));
        const Vec c = forget * Load(cell + i) + in * g;
        Store(cell + i, c);
        Store(state + i, Sigmoid(Load(a + 3 * h + i)) * Tanh(c));
      }
    } else if (s.cell == kGruAfter) {
      for (int64_t i = 0; i < joined; ++i) a[i] = 0.f;
      for (int64_t i = 0; i < h; ++i) a[2 * h + i] = s.bias[i];
      Times(s.first, state, h, a);
      for (int64_t i = 0; i < h; i += kLanes) {
        Vec xz, xr, xh;
        if (i + kLanes <= h) {
          xz = Load(x + i), xr = Load(x + h + i), xh = Load(x + 2 * h + i);
        } else {
          for (int k = 0; k < kLanes; ++k) {
            const int64_t j = i + k < h ? i + k : h - 1;
            xz[k] = x[j], xr[k] = x[h + j], xh[k] = x[2 * h + j];
          }
        }
        const Vec z = Sigmoid(xz + Load(a + i)), r = Sigmoid(xr + Load(a + h + i));
        const Vec c = Tanh(xh + r * Load(a + 2 * h + i));
        Store(state + i, c + z * (Load(state + i) - c));
      }
    } else {
      for (int64_t i = 0; i < gates * h; ++i) a[i] = x[i];
      for (int64_t i = gates * h; i < joined; ++i) a[i] = 0.f;
      Times(s.first, state, h, a);  // z and r
      for (int64_t i = 0; i < h; i += kLanes) Store(gated + i, Sigmoid(Load(a + h + i)) * Load(state + i));
      Times(s.second, gated, h, a + 2 * h);
      for (int64_t i = 0; i < h; i += kLanes) {
        const Vec z = Sigmoid(Load(a + i)), c = Tanh(Load(a + 2 * h + i));
        Store(state + i, c + z * (Load(state + i) - c));
      }
    }
    for (int64_t i = 0; i < h; ++i) y[i] = state[i];
  }
  for (int64_t i = 0; i < h; ++i) s.last[b * h + i] = s.cell == kLstm ? cell[i] : state[i];
}

void Product(const Matrix& m, const float* x, int64_t n, float* y) { Times(m, x, n, y); }
