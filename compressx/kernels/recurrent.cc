// Sparse matrix products and recurrent cells on them, as XLA FFI handlers. A matrix is tiles (see recurrent_loops.h); what
// the packed arrays say is checked before it is followed.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "isa.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace compressx {
namespace {

enum Kind { kScattered = 1, kContiguous = 2 };
enum Cell { kGruBefore = 0, kGruAfter = 1, kLstm = 2 };

struct TileAt {
  int kind, vectors, n, column, weight, output;
};

struct Matrix {
  const TileAt* tile;
  int64_t tiles;
  const uint16_t* columns;
  const int* outputs;
  const float* weights;
};

struct Recurrent {
  int64_t steps, batch, hidden, cell;
  const float *x, *h0, *c0, *bias;
  float *y, *last;
  Matrix first, second;
};

#define COMPRESSX_LOOPS "recurrent_loops.h"
#include "isa_each.h"

#ifdef __x86_64__
#define DISPATCH(isa, call) (isa == kAvx512 ? avx512::call : isa == kAvx2 ? avx2::call : generic::call)
#else
#define DISPATCH(isa, call) (generic::call)
#endif

using Tiles = ffi::BufferR2<ffi::S32>;
using Ids = ffi::BufferR1<ffi::U16>;
using Places = ffi::BufferR1<ffi::S32>;
using Floats = ffi::BufferR1<ffi::F32>;
using Error = ffi::Error;

Error Bad(const std::string& what) { return Error::InvalidArgument("recurrent: " + what); }

// True if every tile stays inside its arrays, its inputs and its outputs; the output `outputs` is the waste slot.
bool Fits(const Tiles& tiles, const Ids& columns, const Places& places, const Floats& weights, int64_t lanes,
          int64_t inputs, int64_t outputs, Matrix* m) {
  const auto d = tiles.dimensions();
  if (d[1] != 6 || inputs > 1 << 16) return false;
  *m = {reinterpret_cast<const TileAt*>(tiles.typed_data()), d[0], columns.typed_data(), places.typed_data(),
        weights.typed_data()};
  const int64_t nc = columns.element_count(), no = places.element_count(), nw = weights.element_count();
  for (int64_t i = 0; i < d[0]; ++i) {
    const TileAt& t = m->tile[i];
    if (t.kind < 0 || t.kind > 3 || t.vectors < 1 || t.vectors > 4 || t.n < 0 || t.column < 0 || t.weight < 0 ||
        t.output < 0)
      return false;
    const int64_t wide = t.vectors * lanes, read = t.kind & kScattered ? t.n * wide : t.n;
    if (t.column + read > nc || t.weight + t.n * wide > nw || t.output + wide > no) return false;
    if (t.kind & kContiguous && m->outputs[t.output] + wide > outputs) return false;
  }
  uint16_t most = 0;
  for (int64_t i = 0; i < nc; ++i) most = std::max(most, m->columns[i]);
  int low = 0, high = 0;
  for (int64_t i = 0; i < no; ++i) low = std::min(low, m->outputs[i]), high = std::max(high, m->outputs[i]);
  return (nc == 0 || most < inputs) && low >= 0 && high <= outputs;
}

Error ProductHandler(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, Tiles tiles, Ids columns, Places places,
                     Floats weights, ffi::Result<ffi::BufferR2<ffi::F32>> y, int64_t isa, int64_t threads) {
  if (isa < 0 || isa > BestIsa()) return Bad("this processor lacks the instruction set asked for");
  const int64_t batch = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  Matrix m;
  if (y->dimensions()[0] != batch || !Fits(tiles, columns, places, weights, Lanes(isa), inputs, outputs, &m))
    return Bad("the packed arrays do not fit each other or the vectors");
  const float* from = x.typed_data();
  float* to = y->typed_data();
  Together(pool, threads, batch, [=](int64_t b) {
    std::vector<float> sums(outputs + 1);
    DISPATCH(isa, Product(m, from + b * inputs, inputs, sums.data()));
    std::memcpy(to + b * outputs, sums.data(), outputs * 4);
  });
  return Error::Success();
}

Error RecurrentHandler(ffi::ThreadPool pool, ffi::BufferR3<ffi::F32> x, ffi::BufferR2<ffi::F32> h0,
                       ffi::BufferR2<ffi::F32> c0, Floats bias, Tiles tiles, Ids columns, Places places, Floats weights,
                       Tiles tiles2, Ids columns2, Places places2, Floats weights2,
                       ffi::Result<ffi::BufferR3<ffi::F32>> y, ffi::Result<ffi::BufferR2<ffi::F32>> last, int64_t isa,
                       int64_t cell, int64_t threads) {
  if (isa < 0 || isa > BestIsa()) return Bad("this processor lacks the instruction set asked for");
  if (cell < 0 || cell > 2) return Bad("no such cell");
  const auto d = x.dimensions(), o = y->dimensions();
  const int64_t steps = d[0], batch = d[1], hidden = h0.dimensions()[1], gates = cell == kLstm ? 4 : 3;
  const int64_t state = batch * hidden;
  if (hidden < 1 || h0.dimensions()[0] != batch || d[2] != gates * hidden || o[0] != steps || o[1] != batch ||
      o[2] != hidden || (int64_t)c0.element_count() != state || (int64_t)last->element_count() != state ||
      (int64_t)bias.element_count() != hidden)
    return Bad("shapes disagree");
  Recurrent s{steps, batch, hidden, cell, x.typed_data(), h0.typed_data(), c0.typed_data(), bias.typed_data(),
              y->typed_data(), last->typed_data(), {}, {}};
  const int64_t lanes = Lanes(isa), first = cell == kGruBefore ? 2 * hidden : gates * hidden;
  if (!Fits(tiles, columns, places, weights, lanes, hidden, first, &s.first) ||
      !Fits(tiles2, columns2, places2, weights2, lanes, hidden, hidden, &s.second))
    return Bad("the packed arrays do not fit each other or the state");
  // The waste slot of the first matrix is the element after its outputs; with kGruBefore that is the next gate's, so
  // padding there has weight zero and adds nothing.
  const int64_t floats = 3 * (hidden + 2 * lanes) + gates * hidden + 4 * lanes;
  Together(pool, threads, batch, [=](int64_t b) {
    std::vector<float> scratch(floats);
    DISPATCH(isa, Sequence(s, b, scratch.data()));
  });
  return Error::Success();
}

}  // namespace
}  // namespace compressx

extern "C" int compressx_recurrent_best_isa() { return compressx::BestIsa(); }

#define MATRIX .Arg<ffi::BufferR2<ffi::S32>>().Arg<ffi::BufferR1<ffi::U16>>().Arg<ffi::BufferR1<ffi::S32>>().Arg<ffi::BufferR1<ffi::F32>>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxSparseProduct, compressx::ProductHandler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::BufferR2<ffi::F32>>() MATRIX
                                  .Ret<ffi::BufferR2<ffi::F32>>().Attr<int64_t>("isa").Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CompressxRecurrent, compressx::RecurrentHandler,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::BufferR3<ffi::F32>>().Arg<ffi::BufferR2<ffi::F32>>().Arg<ffi::BufferR2<ffi::F32>>().Arg<ffi::BufferR1<ffi::F32>>()
        MATRIX MATRIX.Ret<ffi::BufferR3<ffi::F32>>().Ret<ffi::BufferR2<ffi::F32>>().Attr<int64_t>("isa").Attr<int64_t>("cell").Attr<int64_t>("threads"));
