// The inner loops of the sparse convolution, written once for vectors of kLanes floats. `pattern_conv.cc` includes this
// file once per instruction set, inside a namespace of its own and with that set switched on; nothing of the standard
// library is used here, so that no copy made for one instruction set can serve another.
//
// A plane is a flattened image cut into kLanes segments: element i lies in lane i / S of vector i % S. A shift of the
// image by any number of elements is then a shift by that many whole vectors, so every load below is aligned.

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int IVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

constexpr int kWidth = kRegisters == 32 ? 6 : 3;       // vectors of a tile whose inputs stay in registers
constexpr int kRunWidth = kRegisters == 32 ? 16 : 10;  // vectors of a tile whose sums stay in registers

// f(0), ..., f(N - 1), the arguments as constants: arrays indexed by them stay in registers.
template <int N, int I = 0, class Body>
INLINE void Each(const Body& f) {
  if constexpr (I < N) {
    f(Constant<I>{});
    Each<N, I + 1>(f);
  }
}

INLINE Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
// A load into a register of its own. The compiler would rather repeat a load as an operand of every use, and loads are
// what these loops have least of.
INLINE Vec LoadOnce(const float* p) {
  Vec v = Load(p);
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}
INLINE void Store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
INLINE Vec Splat(float a) { return a - Vec{}; }
INLINE Vec Select(IVec mask, Vec v) { return reinterpret_cast<Vec>(mask & reinterpret_cast<IVec>(v)); }

INLINE IVec Lane() {
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// Lanes moved up by m (down for m < 0), zeros moved in.
INLINE Vec Shift(Vec v, int m) {
  const IVec from = Lane() - m;
  const IVec inside = (from >= 0) & (from < kLanes);
  return Select(inside, __builtin_shuffle(v, from & (kLanes - 1)));
}

// Comparisons with NaN are false: each of these leaves NaN as it is.
INLINE Vec Activate(Vec v, int activation) {
  if (activation == kNone) return v;
  if (activation == kLeaky) {
    const Vec less = v * Splat(0.1f);
    return v > less ? v : less;
  }
  v = Vec{} > v ? Vec{} : v;
  if (activation == kRelu6) {
    const Vec six = Splat(6.f);
    v = v > six ? six : v;
  }
  return v;
}

// The larger of two, and of two zeros the positive one; NaN, if kNan, where either is.
template <bool kNan>
INLINE Vec Larger(Vec a, Vec b) {
  const Vec one = a > b ? a : b, other = b > a ? b : a;
  const Vec larger = reinterpret_cast<Vec>(reinterpret_cast<IVec>(one) & reinterpret_cast<IVec>(other));
  return kNan ? (a != a ? a : b != b ? b : larger) : larger;
}

// Gathers bits where a vector has NaN or infinities, for v - v has none elsewhere.
INLINE void Watch(Vec v, IVec* odd) { *odd |= reinterpret_cast<IVec>(v - v); }

INLINE bool Any(IVec odd) {
  int bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= odd[i];
  return bits != 0;
}

NOINLINE bool Odd(const float* from, int64_t vectors) {
  IVec odd = {};
  for (int64_t i = 0; i < vectors; ++i) Watch(Load(from + i * kLanes), &odd);
  return Any(odd);
}

// Writes vector j of a plane, its invalid lanes as zeros, and its copies in the margins.
INLINE void Put(const Grid& g, float* plane, int64_t j, Vec v) {
  v = Select((((int)g.valid[j] >> Lane()) & 1) != 0, v);
  float* main = plane + g.margin * kLanes;
  Store(main + j * kLanes, v);
  for (int64_t m = 1, k = j + g.segment; k < g.segment + g.margin; ++m, k += g.segment)
    Store(main + k * kLanes, Shift(v, (int)-m));
  for (int64_t m = 1, k = j - g.segment; k >= -g.margin; ++m, k -= g.segment) Store(main + k * kLanes, Shift(v, (int)m));
}

// Residual, activation and margins of a block's sums. Out of line: its pointers would push those of the loops out of
// the registers.
template <int F>
NOINLINE void Finish(const Conv& c, int first, int count, int64_t j, const float* sums) {
  for (int k = 0; k < count; ++k, sums += F * kLanes) {
    const int64_t filter = c.order[first + k];
    const float* add = c.residual ? c.residual + (filter * c.add.plane() + c.add.margin + j) * kLanes : nullptr;
    float* plane = c.y + filter * c.out.plane() * kLanes;
    Each<F>([&](auto f) {
      Vec v = Load(sums + f * kLanes);
      if (add && !c.after) v += Load(add + f * kLanes);
      v = Activate(v, c.activation);
      if (add && c.after) v += Load(add + f * kLanes);
      Put(c.out, plane, j + f, v);
    });
  }
}

// The sums of a block begin as the biases of its filters.
template <int F>
NOINLINE void Begin(const Conv& c, int first, int count, float* sums) {
  for (int k = 0; k < count; ++k, sums += F * kLanes) {
    const Vec bias = Splat(c.bias[c.order[first + k]]);
    Each<F>([&](auto f) { Store(sums + f * kLanes, bias); });
  }
}

// Adds what a weight contributes to `width` vectors of sums. A weight that is not finite meets the elements of images
// alone, and not the zeros around them.
INLINE void AddReal(const Conv& c, const float* from, float weight, int width, float* to) {
  const Vec w = Splat(weight);
  if (weight - weight == 0.f) {
    for (int f = 0; f < width * kLanes; f += kLanes) Store(to + f, Load(to + f) + Load(from + f) * w);
    return;
  }
  const int64_t channel = c.planes * c.in.plane(), at = (from - c.x) / kLanes % channel;
  for (int f = 0; f < width; ++f) {
    const int64_t vector = at + f < channel ? at + f : at + f - channel;
    const IVec real = (((int)c.real[vector] >> Lane()) & 1) != 0;
    Store(to + f * kLanes, Load(to + f * kLanes) + Select(real, Load(from + f * kLanes) * w));
  }
}

// A weight of a visit that is none of the layer's: -0, bit for bit.
INLINE bool Filler(float weight) {
  unsigned bits;
  __builtin_memcpy(&bits, &weight, 4);
  return bits == 0x80000000u;
}

// The sums of a block among which are NaN or infinities, without what the fast loops add to them: fillers times an input
// that is not finite, and such a weight times the zeros around the images. Finite sums come out as they were. A layer
// that has neither fillers nor such weights is not guarded: its fast sums are right.
NOINLINE void ExactSums(const Conv& c, int64_t block, int64_t j, int width, float* sums) {
  const int first = (int)block * c.filters, count = c.couts - first < c.filters ? c.couts - first : c.filters;
  const int wide = width * kLanes;
  for (int k = 0; k < count; ++k)
    for (int f = 0; f < width; ++f) Store(sums + k * wide + f * kLanes, Splat(c.bias[c.order[first + k]]));
  const float* base = c.x + (c.in.margin + j) * kLanes;
  if (c.taps) {
    const uint8_t* index = c.index + c.kernel_start[block];
    const float* weight = c.weight + (int64_t)c.kernel_start[block] * c.taps;
    for (int v = c.visit_start[block]; v < c.visit_start[block + 1]; ++v) {
      const uint32_t visit = c.visits[v];
      const float* at = base + (visit >> 16) * (c.planes * c.in.plane() * kLanes);
      const int* offset = c.offsets + (visit >> 8 & 255) * c.taps;
      for (const uint8_t* stop = index + (visit & 255) + 1; index != stop; ++index, weight += c.taps)
        for (int e = 0; e < c.taps; ++e)
          if (!Filler(weight[e])) AddReal(c, at + (int64_t)offset[e] * kLanes, weight[e], width, sums + *index * wide);
    }
    return;
  }
  for (int group = 0; group < c.groups; ++group) {
    const int64_t item = (int64_t)group * c.couts + first;
    const int* start = c.run_start + item * kLongest;
    const float* weight = c.weight + c.value_start[item];
    for (int k = 0; k < count; ++k, start += kLongest)
      for (int n = 0; n < kLongest; ++n)
        for (const int* place = c.places + start[n]; place != c.places + start[n + 1]; ++place)
          for (int i = 0; i <= n; ++i, ++weight)
            AddReal(c, base + (int64_t)(*place + i) * kLanes, *weight, width, sums + k * wide);
  }
}

// Inputs stay, outputs move. A visit is an input channel and a pattern: its E * F input vectors are loaded once into
// registers and serve all `n` kernels of the block that have this pattern there; the sums of a block lie in the L1 cache.
template <int E, int F>
NOINLINE void VisitTile(const Conv& c, int64_t block, int64_t j, float* sums) {
  const int first = (int)block * c.filters, count = c.couts - first < c.filters ? c.couts - first : c.filters;
  Begin<F>(c, first, count, sums);
  const float* base = c.x + (c.in.margin + j) * kLanes;
  const int64_t channel = c.planes * c.in.plane() * kLanes;
  const uint8_t* index = c.index + c.kernel_start[block];
  const float* weight = c.weight + (int64_t)c.kernel_start[block] * E;
  int64_t ahead = -1;  // of the lines that the channel after the next one will read: one is asked for at every visit
  const uint32_t* end = c.visits + c.visit_start[block + 1];
  for (const uint32_t* visit = c.visits + c.visit_start[block]; visit < end; ++visit) {
    const uint32_t v = *visit;
    const float* at = base + (v >> 16) * channel;
    const int* offset = c.offsets + (v >> 8 & 255) * E;
    const float* next = at + 2 * channel + (c.reach + ahead) * kLanes;
    ahead = ahead == F ? -1 : ahead + 1;
    for (int r = 0; r < 3; ++r) __builtin_prefetch(next - r * c.row * kLanes);
    Vec x[E * F];
    Each<E>([&](auto e) {
      const float* from = at + (int64_t)offset[e] * kLanes;
      Each<F>([&](auto f) { x[e * F + f] = Load(from + f * kLanes); });
    });
    const uint8_t* stop = index + (v & 255) + 1;
    do {
      float* to = sums + *index * (F * kLanes);
      Vec s[F];
      Each<F>([&](auto f) { s[f] = LoadOnce(to + f * kLanes); });
      Each<E>([&](auto e) {
        const Vec w = Splat(weight[e]);
        Each<F>([&](auto f) { s[f] += x[e * F + f] * w; });
      });
      Each<F>([&](auto f) { Store(to + f * kLanes, s[f]); });
      weight += E;
    } while (++index != stop);
  }
  if (c.guarded && Odd(sums, (int64_t)count * F)) ExactSums(c, block, j, F, sums);
  Finish<F>(c, first, count, j, sums);
}

// Adds a run of K weights, which read neighbouring vectors: each input is loaded once for all of them.
template <int K, int F>
INLINE void AddRun(const float* from, const float* weight, Vec* sum) {
  Vec w[K];
  Each<K>([&](auto k) { w[k] = Splat(weight[k]); });
  Each<F + K - 1>([&](auto i) {
    const Vec v = K == 1 ? Load(from + i * kLanes) : LoadOnce(from + i * kLanes);
    Each<K>([&](auto k) {
      if constexpr (i >= k && i - k < F) sum[i - k] += v * w[k];
    });
  });
}

// Outputs stay, inputs move. A weight is a place and a value, and neighbours in a row are a run with one place; the sums
// of a filter are registers. The weights of a group of input channels come together, so that the inputs of a group stay
// in the L1 cache over all filters, whose runs come sorted by length.
template <int F>
NOINLINE void RunTile(const Conv& c, int64_t block, int64_t j, float* sums) {
  const int first = (int)block * c.filters, count = c.couts - first < c.filters ? c.couts - first : c.filters;
  const float* base = c.x + (c.in.margin + j) * kLanes;
  for (int group = 0; group < c.groups; ++group) {
    const int64_t item = (int64_t)group * c.couts + first;
    const int* start = c.run_start + item * kLongest;
    const int *places = c.places, *place = places + *start;
    const float* weight = c.weight + c.value_start[item];
    for (int k = 0; k < count; ++k, start += kLongest) {
      Vec s[F];
      float* to = sums + (int64_t)k * F * kLanes;
      if (group == 0) Begin<F>(c, first + k, 1, to);
      Each<F>([&](auto f) { s[f] = Load(to + f * kLanes); });
      Each<kLongest>([&](auto n) {
        for (const int* stop = places + start[n + 1]; place != stop; ++place, weight += n + 1)
          AddRun<n + 1, F>(base + (int64_t)*place * kLanes, weight, s);
      });
      Each<F>([&](auto f) { Store(to + f * kLanes, s[f]); });
      if (group + 1 == c.groups) Finish<F>(c, first + k, 1, j, to);
    }
  }
  if (c.guarded && Odd(sums, (int64_t)count * F)) {
    ExactSums(c, block, j, F, sums);
    for (int k = 0; k < count; ++k) Finish<F>(c, first + k, 1, j, sums + (int64_t)k * F * kLanes);
  }
}

template <int E, int F>
void VisitSized(int width, const Conv& c, int64_t block, int64_t j, float* sums) {
  if constexpr (F > 0) {
    if (width == F) return VisitTile<E, F>(c, block, j, sums);
    VisitSized<E, F - 1>(width, c, block, j, sums);
  }
}

template <int F>
void RunSized(int width, const Conv& c, int64_t block, int64_t j, float* sums) {
  if constexpr (F > 0) {
    if (width == F) return RunTile<F>(c, block, j, sums);
    RunSized<F - 1>(width, c, block, j, sums);
  }
}

// One block of filters at `width` vectors from j on.
void Tile(const Conv& c, int64_t block, int64_t j, int width, float* sums) {
  switch (c.taps) {
    case 0: return RunSized<kRunWidth>(width, c, block, j, sums);
    case 2: return VisitSized<2, kWidth>(width, c, block, j, sums);
    case 3: return VisitSized<3, kWidth>(width, c, block, j, sums);
    case 4: return VisitSized<4, kWidth>(width, c, block, j, sums);
    default: return VisitSized<5, kWidth>(width, c, block, j, sums);
  }
}

// True if no element is less than the one before it.
bool NeverFalls(const int* x, int64_t n) {
  int falls = 0;
  for (int64_t i = 1; i < n; ++i) falls |= x[i] < x[i - 1];
  return !falls;
}

// Widens [low, high] to hold every element.
void Range(const int* x, int64_t n, int* low, int* high) {
  int least = *low, most = *high;
  for (int64_t i = 0; i < n; ++i) {
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
  }
  *low = least, *high = most;
}

// Multiply-adds on registers alone, n rounds of them: what the processor could do at most.
NOINLINE float Peak(int64_t n) {
  constexpr int kSums = kRegisters == 32 ? 16 : 10;
  Vec s[kSums];
  const Vec w = Splat(0.999f), v = Splat(1e-3f);
  Each<kSums>([&](auto i) { s[i] = Splat((float)i); });
  for (int64_t k = 0; k < n; ++k) Each<kSums>([&](auto i) { s[i] = s[i] * w + v; });
  Vec total = {};
  Each<kSums>([&](auto i) { total += s[i]; });
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum + (float)(2 * kSums * kLanes);
}

// The largest of the rows * columns window at every vector from which it fits, in `to`; true if it saw NaN or infinities.
template <bool kNan>
INLINE bool Largest(const float* from, int64_t vectors, int64_t row, int rows, int columns, float* to) {
  IVec odd = {};
  for (int64_t j = 0; j < vectors - (rows - 1) * row - (columns - 1); ++j) {
    __builtin_prefetch(from + (j + (rows - 1) * row + 32) * kLanes);
    Vec v = Load(from + j * kLanes);
    Watch(v, &odd);
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < columns; ++k) v = Larger<kNan>(v, Load(from + (j + r * row + k) * kLanes));
    Store(to + j * kLanes, v);
  }
  const int64_t last = (rows - 1) * row + columns - 1;
  return Any(odd) || Odd(from + (vectors - last) * kLanes, last);
}

void WindowMax(const float* from, int64_t vectors, int64_t row, int rows, int columns, float* to) {
  if (Largest<false>(from, vectors, row, rows, columns, to)) Largest<true>(from, vectors, row, rows, columns, to);
}

// Fills a plane from chosen elements of another.
void Gather(const Grid& g, const float* from, const int* source, float* plane) {
  for (int64_t j = 0; j < g.segment; ++j) {
    float chosen[kLanes];
    for (int i = 0; i < kLanes; ++i) chosen[i] = from[source[j * kLanes + i]];
    Put(g, plane, j, Load(chosen));
  }
}
