// Sparse convolution over planes, with bias, activation and residual fused, and the moves into, out of and between planes,
// as XLA FFI handlers. Everything that a packed array says is checked before it is followed.

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "isa.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace compressx {
namespace {

enum Activation { kNone = 0, kRelu = 1, kRelu6 = 2, kLeaky = 3 };
constexpr int kMostFilters = 256;  // of a block: an index is a byte
constexpr int kLongest = 3;        // run of weights

// A plane: `segment` vectors of lanes, and before and after them `margin` vectors that continue the image.
struct Grid {
  int64_t segment, margin;
  const uint16_t* valid;  // [segment], a bit a lane: where the image has an element
  int64_t plane() const { return segment + 2 * margin; }
};

struct Conv {
  const float* x;
  float* y;
  const float* bias;
  const float* residual;  // null: none
  const uint16_t* real;   // [planes, in.plane()], a bit a lane: where a channel of x has an element
  Grid in, out, add;      // of x, y and residual, of one segment length
  int planes;             // of an input channel (more than one: the phases of a stride)
  int couts, filters, taps, activation, groups;
  bool guarded;  // its sums may need ExactSums
  bool after;  // the residual is added after the activation
  const int* order;
  const uint32_t* visits;  // input channel << 16 | pattern << 8 | kernels - 1
  const int *visit_start, *kernel_start, *offsets;
  const uint8_t* index;
  const float* weight;
  const int *run_start, *value_start, *places;
  int64_t row, reach;  // of the image, and the farthest of three rows of inputs that are prefetched
};

#define COMPRESSX_LOOPS "pattern_conv_loops.h"
#include "isa_each.h"

#ifdef __x86_64__
#define DISPATCH(isa, call) (isa == kAvx512 ? avx512::call : isa == kAvx2 ? avx2::call : generic::call)
#else
#define DISPATCH(isa, call) (generic::call)
#endif

using F32 = ffi::AnyBuffer;
using Error = ffi::Error;

Error Bad(const std::string& what) { return Error::InvalidArgument("pattern convolution: " + what); }

template <class T>
struct Span {
  const T* data;
  int64_t size;
};

template <class T>
bool Take(const ffi::AnyBuffer& b, ffi::DataType type, Span<T>* to) {
  *to = {static_cast<const T*>(b.untyped_data()), static_cast<int64_t>(b.element_count())};
  return b.element_type() == type;
}

bool Rises(int isa, const int* x, int64_t n, int64_t last) {
  return n > 0 && x[0] == 0 && x[n - 1] == last && DISPATCH(isa, NeverFalls(x, n));
}

// True if every visit stays inside the input, every index inside its block, and the counts add up.
bool VisitsFit(int isa, const Conv& c, int64_t blocks, int64_t visits, int64_t kernels, int64_t patterns,
               int64_t cin) {
  const int64_t plane = c.in.plane(), total = cin * c.planes * plane;
  std::vector<int64_t> low(patterns), high(patterns);
  for (int64_t p = 0; p < patterns; ++p) {
    const auto [a, b] = std::minmax_element(c.offsets + p * c.taps, c.offsets + (p + 1) * c.taps);
    low[p] = *a + c.in.margin;
    high[p] = *b + c.in.margin + c.in.segment;
  }
  if (!Rises(isa, c.visit_start, blocks + 1, visits) || !Rises(isa, c.kernel_start, blocks + 1, kernels)) return false;
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t sum = 0;
    for (int v = c.visit_start[block]; v < c.visit_start[block + 1]; ++v) {
      const int64_t at = (int64_t)(c.visits[v] >> 16) * c.planes * plane, p = c.visits[v] >> 8 & 255;
      if (p >= patterns || at + low[p] < 0 || at + high[p] > total) return false;
      sum += (c.visits[v] & 255) + 1;
    }
    if (sum != c.kernel_start[block + 1] - c.kernel_start[block]) return false;
    int most = -1;
    for (int k = c.kernel_start[block]; k < c.kernel_start[block + 1]; ++k) most = std::max<int>(most, c.index[k]);
    if (most >= std::min<int64_t>(c.filters, c.couts - block * c.filters)) return false;
  }
  return true;
}

// True if every run stays inside the input and the counts of runs and of their weights add up.
bool RunsFit(int isa, const Conv& c, int64_t runs, int64_t values, int64_t cin) {
  const int64_t items = (int64_t)c.groups * c.couts, total = cin * c.planes * c.in.plane();
  const int64_t last = total - c.in.margin - c.in.segment;  // place of a weight by itself
  if (!Rises(isa, c.run_start, items * kLongest + 1, runs) || !Rises(isa, c.value_start, items + 1, values)) return false;
  for (int64_t i = 0; i < items; ++i) {
    const int* start = c.run_start + i * kLongest;
    int64_t sum = 0;
    for (int n = 0; n < kLongest; ++n) sum += (int64_t)(n + 1) * (start[n + 1] - start[n]);
    if (sum != c.value_start[i + 1] - c.value_start[i]) return false;
  }
  for (int group = 0; group < c.groups; ++group) {
    const int* start = c.run_start + (int64_t)group * c.couts * kLongest;
    const int begin = start[0], end = start[(int64_t)c.couts * kLongest];
    int low = 0, high = std::numeric_limits<int>::min();
    DISPATCH(isa, Range(c.places + begin, end - begin, &low, &high));
    if (low < -c.in.margin) return false;
    if (high + kLongest - 1 <= last) continue;
    for (int64_t i = 0; i < (int64_t)c.couts * kLongest; ++i)
      for (int k = start[i]; k < start[i + 1]; ++k)
        if (c.places[k] + i % kLongest > last) return false;
  }
  return true;
}

// XLA takes fresh memory for every run of a program, and touching it costs a page fault for each 4 KiB; asked for in
// time, the kernel gives whole pages of 2 MiB. Advice only: it may be refused.
void AskForHugePages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096, kHuge = 2 << 20;
  if (bytes < kHuge) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct Scratch {
  explicit Scratch(size_t floats) : data(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 127) / 64 * 64))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  float* data;
};

Error ConvHandler(ffi::ThreadPool pool, F32 x, F32 weight, F32 index, F32 visits, F32 starts, F32 offsets, F32 places,
                  F32 order, F32 bias, F32 valid, F32 real, F32 residual, ffi::Result<F32> y, int64_t isa, int64_t segment,
                  int64_t margin, int64_t margin_in, int64_t margin_add, int64_t row, int64_t planes, int64_t taps, int64_t filters, int64_t width,
                  int64_t groups, int64_t columns, int64_t guarded, int64_t activation, int64_t after, int64_t threads) {
  Conv c{};
  Span<float> xs, ws, bs, rs, ys;
  Span<uint8_t> is;
  Span<uint32_t> vs;
  Span<int> ss, os, ps, fs;
  Span<uint16_t> ms, es;
  if (!Take(x, ffi::F32, &xs) || !Take(weight, ffi::F32, &ws) || !Take(index, ffi::U8, &is) ||
      !Take(visits, ffi::U32, &vs) || !Take(starts, ffi::S32, &ss) || !Take(offsets, ffi::S32, &os) ||
      !Take(places, ffi::S32, &ps) || !Take(order, ffi::S32, &fs) || !Take(bias, ffi::F32, &bs) ||
      !Take(valid, ffi::U16, &ms) || !Take(real, ffi::U16, &es) || !Take(residual, ffi::F32, &rs) ||
      !Take(*y, ffi::F32, &ys))
    return Bad("an operand has another dtype than it should");
  if (isa < 0 || isa > BestIsa()) return Bad("this processor lacks the instruction set asked for");
  const int lanes = Lanes(isa);
  const int64_t most = taps == 0 ? DISPATCH(isa, kRunWidth) : DISPATCH(isa, kWidth);
  constexpr int64_t kLarge = 1 << 30;
  if (segment < 1 || segment > kLarge || margin < 0 || margin > kLarge || margin_in < 0 || margin_in > kLarge ||
      margin_add < 0 || margin_add > kLarge || row < 1 || row > kLarge || planes < 1 || planes > 4096 || !(taps == 0 || (taps >= 2 && taps <= 5)) || filters < 1 || filters > kLarge || width < 1 ||
      width > most || groups < 1 || groups > kLarge || activation < 0 || activation > kLeaky || after < 0 || after > 1 || guarded < 0 || guarded > 1 || threads < 0)
    return Bad("an attribute is out of range");
  if (taps && filters > kMostFilters) return Bad("more filters in a block than an index can name");
  c.in = Grid{segment, margin_in, ms.data}, c.out = Grid{segment, margin, ms.data};
  c.add = Grid{segment, margin_add, ms.data};
  const int64_t couts = fs.size, channel = c.in.plane() * lanes * planes, cin = xs.size / channel;
  if (cin * channel != xs.size || couts * c.out.plane() * lanes != ys.size || bs.size != couts || couts < 1 ||
      ms.size != segment || es.size != planes * c.in.plane() || (rs.size != 0 && rs.size != couts * c.add.plane() * lanes))
    return Bad("shapes disagree");
  std::vector<bool> seen(couts);
  for (int64_t i = 0; i < couts; ++i) {
    if (fs.data[i] < 0 || fs.data[i] >= couts || seen[fs.data[i]]) return Bad("the order of filters is no permutation");
    seen[fs.data[i]] = true;
  }
  c.x = xs.data;
  c.y = static_cast<float*>(y->untyped_data());
  c.bias = bs.data;
  c.residual = rs.size ? rs.data : nullptr;
  c.real = es.data;
  c.row = row, c.reach = row;
  c.planes = planes, c.couts = couts, c.filters = std::min(filters, couts), c.taps = taps;
  c.activation = activation, c.groups = groups, c.after = after, c.guarded = guarded;
  c.order = fs.data, c.visits = vs.data, c.offsets = os.data, c.index = is.data, c.weight = ws.data;
  const int64_t blocks = (couts + c.filters - 1) / c.filters;
  if (taps) {
    c.visit_start = ss.data, c.kernel_start = ss.data + blocks + 1;
    if (ss.size != 2 * (blocks + 1) || os.size % taps || ws.size != is.size * taps ||
        !VisitsFit(isa, c, blocks, vs.size, is.size, os.size / taps, cin))
      return Bad("the packed arrays do not fit each other or the input");
  } else {
    const int64_t items = groups * couts;
    c.run_start = ss.data, c.value_start = ss.data + items * kLongest + 1, c.places = ps.data;
    if (groups > kLarge / couts || ss.size != items * (kLongest + 1) + 2 || !RunsFit(isa, c, ps.size, ws.size, cin))
      return Bad("the packed arrays do not fit each other or the input");
  }
  AskForHugePages(c.y, ys.size * 4);
  // Tiles run down a column of the image, so that of three rows of inputs two are in the cache from the tile above.
  const int64_t high = columns ? (segment + row - 1) / row : 1;
  const int64_t reach = columns ? std::min(row, segment) : segment;
  const int64_t tiles = (reach + width - 1) / width * high;
  const int64_t floats = c.filters * width * lanes;
  const int64_t each = std::max<int64_t>(1, tiles * blocks / 64);  // of a task
  Together(pool, threads, (tiles * blocks + each - 1) / each, [=](int64_t task) {
    Scratch sums(floats);
    for (int64_t i = task * each; i < std::min(tiles * blocks, (task + 1) * each); ++i) {
      const int64_t tile = i / blocks, across = tile / high * width, j = tile % high * row + across;
      const int64_t size = std::min(std::min(width, reach - across), segment - j);
      if (size > 0) DISPATCH(isa, Tile(c, i % blocks, j, size, sums.data));
    }
  });
  return Error::Success();
}

// [n, h, w, c] to [c, plane, lanes] and back. Element (b, y, x) of an image is element b * image + y * row + x of a plane.
struct Images {
  static constexpr int64_t kGroup = 16, kMostLanes = 16;  // channels moved together
  int64_t n, h, w, c, row, image, segment, margin, lanes;
  bool fits(int64_t dense, int64_t planes) const {
    return n > 0 && h > 0 && w > 0 && c > 0 && row >= w && image >= (h - 1) * row + w && segment > 0 && margin >= 0 &&
           lanes > 0 && (n - 1) * image + (h - 1) * row + w <= segment * lanes && dense == n * h * w * c && dense / c < std::numeric_limits<int32_t>::max() &&
           planes == c * (segment + 2 * margin) * lanes;
  }
  // The pixel at every element of a segment's vectors, -1 in the gaps.
  std::vector<int32_t> pixels() const {
    std::vector<int32_t> at(segment * lanes, -1);
    for (int64_t line = 0; line < n * h; ++line) {
      const int64_t first = line / h * image + line % h * row;
      int64_t lane = first / segment, j = first % segment;
      for (int64_t x = 0; x < w; ++x) {
        at[j * lanes + lane] = (int32_t)(line * w + x);
        if (++j == segment) j = 0, ++lane;
      }
    }
    return at;
  }
  // f(pixels of a vector, its place in a plane, first channel, end) for all vectors and groups of channels.
  template <class Body>
  void each(ffi::ThreadPool& pool, int64_t threads, const Body& f) const {
    constexpr int64_t kVectors = 64;
    const auto at = std::make_shared<std::vector<int32_t>>(pixels());
    const Images s = *this;
    Together(pool, threads, (segment + kVectors - 1) / kVectors, [=](int64_t task) {
      const int64_t end = std::min(s.segment, (task + 1) * kVectors);
      for (int64_t c = 0; c < s.c; c += kGroup)
        for (int64_t j = task * kVectors; j < end; ++j)
          f(at->data() + j * s.lanes, (s.margin + j) * s.lanes, c, std::min(s.c, c + kGroup));
    });
  }
};

Error ToPlanesHandler(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> x, ffi::Result<F32> y, int64_t isa, int64_t row,
                      int64_t image, int64_t segment, int64_t margin, int64_t threads) {
  if (isa < 0 || isa > BestIsa()) return Bad("this processor lacks the instruction set asked for");
  const auto d = x.dimensions();
  const Images s{d[0], d[1], d[2], d[3], row, image, segment, margin, Lanes(isa)};
  if (y->element_type() != ffi::F32 || !s.fits(x.element_count(), y->element_count())) return Bad("shapes disagree");
  const float* from = x.typed_data();
  float* to = static_cast<float*>(y->untyped_data());
  const int64_t plane = (segment + 2 * margin) * s.lanes;
  AskForHugePages(to, s.c * plane * 4);
  s.each(pool, threads, [=](const int32_t* pixel, int64_t place, int64_t first, int64_t end) {
    float block[Images::kGroup * Images::kMostLanes];  // so that the planes see whole vectors
    for (int64_t lane = 0; lane < s.lanes; ++lane)
      for (int64_t c = first; c < end; ++c)
        block[(c - first) * s.lanes + lane] = pixel[lane] < 0 ? 0.f : from[pixel[lane] * s.c + c];
    for (int64_t c = first; c < end; ++c) std::memcpy(to + c * plane + place, block + (c - first) * s.lanes, s.lanes * 4);
  });
  Together(pool, threads, s.c, [=](int64_t c) {
    float* p = to + c * plane;
    for (int64_t j = -margin; j < segment + margin; ++j) {
      if (j == 0) j = segment;
      if (j >= segment + margin) break;
      const int64_t shift = j < 0 ? -((-j + segment - 1) / segment) : j / segment, k = j - shift * segment;
      for (int64_t lane = 0; lane < s.lanes; ++lane) {
        const int64_t source = lane + shift;
        const bool inside = source >= 0 && source < s.lanes;
        p[(margin + j) * s.lanes + lane] = inside ? p[(margin + k) * s.lanes + source] : 0.f;
      }
    }
  });
  return Error::Success();
}

Error FromPlanesHandler(ffi::ThreadPool pool, F32 x, ffi::Result<ffi::BufferR4<ffi::F32>> y, int64_t isa, int64_t row,
                        int64_t image, int64_t segment, int64_t margin, int64_t threads) {
  if (isa < 0 || isa > BestIsa()) return Bad("this processor lacks the instruction set asked for");
  const auto d = y->dimensions();
  const Images s{d[0], d[1], d[2], d[3], row, image, segment, margin, Lanes(isa)};
  if (x.element_type() != ffi::F32 || !s.fits(y->element_count(), x.element_count())) return Bad("shapes disagree");
  const float* from = static_cast<const float*>(x.untyped_data());
  float* to = y->typed_data();
  const int64_t plane = (segment + 2 * margin) * s.lanes;
  s.each(pool, threads, [=](const int32_t* pixel, int64_t place, int64_t first, int64_t end) {
    for (int64_t lane = 0; lane < s.lanes; ++lane)
      if (pixel[lane] >= 0)
        for (int64_t c = first; c < end; ++c) to[pixel[lane] * s.c + c] = from[c * plane + place + lane];
  });
  return Error::Success();
}

// Planes of one grid from planes of another: the maximum of a window, taken at chosen positions. Without a window these are
// the phases of a stride, several planes of each channel.
Error ResampleHandler(ffi::ThreadPool pool, F32 x, F32 source, F32 valid, ffi::Result<F32> y, int64_t isa,
                      int64_t segment, int64_t margin, int64_t row, int64_t out_segment, int64_t out_margin,
                      int64_t rows, int64_t columns, int64_t threads) {
  Span<float> xs;
  Span<int> is;
  Span<uint16_t> ms;
  if (!Take(x, ffi::F32, &xs) || !Take(source, ffi::S32, &is) || !Take(valid, ffi::U16, &ms) ||
      y->element_type() != ffi::F32)
    return Bad("an operand has another dtype than it should");
  if (isa < 0 || isa > BestIsa()) return Bad("this processor lacks the instruction set asked for");
  constexpr int64_t kLarge = 1 << 30;
  if (segment < 1 || segment > kLarge || margin < 0 || margin > kLarge || row < 1 || row > kLarge || out_segment < 1 ||
      out_segment > kLarge || out_margin < 0 || out_margin > kLarge || rows < 1 || rows > 64 || columns < 1 ||
      columns > 64)
    return Bad("an attribute is out of range");
  const int64_t lanes = Lanes(isa), vectors = segment + 2 * margin, plane = vectors * lanes;
  const int64_t out_plane = (out_segment + 2 * out_margin) * lanes, cells = out_segment * lanes;
  const int64_t channels = xs.size / plane, phases = is.size / cells;
  const int64_t usable = vectors - (rows - 1) * row - (columns - 1);
  if (channels * plane != xs.size || phases * cells != is.size || ms.size != out_segment || usable < 1 ||
      (int64_t)y->element_count() != channels * phases * out_plane)
    return Bad("shapes disagree");
  for (int64_t i = 0; i < is.size; ++i)
    if (is.data[i] < 0 || is.data[i] >= usable * lanes) return Bad("a place lies outside the plane");
  float* out = static_cast<float*>(y->untyped_data());
  AskForHugePages(out, channels * phases * out_plane * 4);
  const Grid grid{out_segment, out_margin, ms.data};
  const int64_t each = (channels + 15) / 16;  // of a task, which takes scratch once
  Together(pool, threads, (channels + each - 1) / each, [=](int64_t task) {
    Scratch scratch(rows * columns > 1 ? plane : 0);
    for (int64_t c = task * each; c < std::min(channels, (task + 1) * each); ++c) {
      const float* from = xs.data + c * plane;
      if (rows * columns > 1) {
        DISPATCH(isa, WindowMax(from, vectors, row, rows, columns, scratch.data));
        from = scratch.data;
      }
      for (int64_t p = 0; p < phases; ++p)
        DISPATCH(isa, Gather(grid, from, is.data + p * cells, out + (c * phases + p) * out_plane));
    }
  });
  return Error::Success();
}

}  // namespace
}  // namespace compressx

extern "C" int compressx_best_isa() { return compressx::BestIsa(); }

// Multiply-adds a second of one core with the best instruction set, in units of 10^9 operations; about 30 ms of work.
extern "C" double compressx_peak() {
  using namespace compressx;
  const int isa = BestIsa();
  const double each = isa == kAvx512 ? 2 * 16 * 16 : 2 * 10 * Lanes(isa);
  double best = 0;
  for (int i = 0; i < 8; ++i) {
    constexpr int64_t kRounds = 500000;
    const auto start = std::chrono::steady_clock::now();
    volatile float sink = DISPATCH(isa, Peak(kRounds));
    (void)sink;
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, each * kRounds / seconds.count() * 1e-9);
  }
  return best;
}

#define A(name) .Attr<int64_t>(name)
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CompressxPatternConv, compressx::ConvHandler,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
        A("isa") A("segment") A("margin") A("margin_in") A("margin_add") A("row") A("planes") A("taps") A("filters") A("width") A("groups")
            A("columns") A("guarded") A("activation") A("after") A("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxToPlanes, compressx::ToPlanesHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::BufferR4<ffi::F32>>().Ret<ffi::AnyBuffer>()
                                  A("isa") A("row") A("image") A("segment") A("margin") A("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxFromPlanes, compressx::FromPlanesHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::BufferR4<ffi::F32>>()
                                  A("isa") A("row") A("image") A("segment") A("margin") A("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CompressxResample, compressx::ResampleHandler,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
        A("isa") A("segment") A("margin") A("row") A("out_segment") A("out_margin") A("rows") A("columns") A("threads"));
