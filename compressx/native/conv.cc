// Direct convolution, its weight gradient and its input gradient, float32, NHWC, as XLA FFI handlers.
//
// The reduction over (kx, cin) of one kernel row runs over consecutive floats of an image row, so both kernels see it as
// one axis `q` of length kw * cin and need no patches. A tile keeps T x R vector registers of sums: T positions by R
// vectors of output channels. The rest is copying: an image into a frame of zeros, channels padded to whole vectors.
//
// Those zeros must not meet NaN or an infinity. Where they might, the plain loops at the end of the kernels run instead,
// over pairs of pixels that both exist.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16, kTile1 = 16, kTile2 = 8, kTile4 = 6;  // 32 registers
#else
constexpr int kLanes = 8, kTile1 = 8, kTile2 = 4, kTile4 = 2;  // 16 registers
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4)));

Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }

struct Shape {
  int64_t h, w, ci, kh, kw, oh, ow, co, stride, top, left, dilation;
  int64_t frame_h() const { return (oh - 1) * stride + kh; }
  int64_t frame_w() const { return (ow - 1) * stride + kw; }
  int64_t q() const { return kw * ci; }                                       // reduction within one kernel row
  int64_t spread() const { return (q() + kLanes - 1) / kLanes * kLanes; }     // q in whole vectors
  int64_t padded() const { return (co + kLanes - 1) / kLanes * kLanes; }      // output channels in whole vectors
};

// Puts an image into a frame of zeros, rows and columns `dilation` apart; returns the image itself where it fills it.
const float* Frame(const Shape& s, const float* x, std::vector<float>& frame) {
  const int64_t fh = s.frame_h(), fw = s.frame_w();
  if (s.top == 0 && s.left == 0 && s.dilation == 1 && fh == s.h && fw == s.w) return x;
  frame.assign(fh * fw * s.ci, 0.f);
  for (int64_t i = 0; i < s.h; ++i) {
    const int64_t fi = s.top + i * s.dilation;
    if (fi < 0 || fi >= fh) continue;
    const float* from = x + i * s.w * s.ci;
    float* to = frame.data() + fi * fw * s.ci;
    if (s.dilation == 1) {
      const int64_t first = std::max<int64_t>(0, -s.left), last = std::min(s.w, fw - s.left);
      if (last > first) std::memcpy(to + (s.left + first) * s.ci, from + first * s.ci, (last - first) * s.ci * 4);
    } else {
      for (int64_t j = 0; j < s.w; ++j) {
        const int64_t fj = s.left + j * s.dilation;
        if (fj >= 0 && fj < fw) std::memcpy(to + fj * s.ci, from + j * s.ci, s.ci * 4);
      }
    }
  }
  return frame.data();
}

// Copies `rows` rows of `co` floats to rows of `padded` floats, zeros after.
const float* PadRows(const float* from, int64_t rows, int64_t co, int64_t padded, std::vector<float>& to) {
  if (co == padded) return from;
  to.assign(rows * padded, 0.f);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to.data() + i * padded, from + i * co, co * 4);
  return to.data();
}

// The part of the kernel that meets no zeros of the frame's making: rows [begin, end) and columns from `first` on, each
// `dilation` apart. Without dilation a row of the kernel is one run of floats, else each of its columns is a run.
struct Taps {
  int64_t begin, end, first;
};

// T outputs of one row, `dilation` columns apart, R vectors of channels from `c` on.
template <int T, int R>
void ConvTile(const Shape& s, const Taps& taps, const float* x, const float* w, float* y, int64_t c) {
  const int64_t row = s.frame_w() * s.ci, step = s.stride * s.dilation * s.ci, wide = s.padded();
  const int64_t run = s.dilation == 1 ? s.q() : s.ci, stop = s.dilation == 1 ? 1 : s.kw;
  Vec acc[T][R] = {};
  for (int64_t ky = taps.begin; ky < taps.end; ky += s.dilation) {
    for (int64_t kx = taps.first; kx < stop; kx += s.dilation) {
      const float* xr = x + ky * row + kx * s.ci;
      const float* wr = w + (ky * s.kw + kx) * s.ci * wide;
      for (int64_t j = 0; j < run; ++j, wr += wide) {
        Vec wv[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) wv[r] = Load(wr + r * kLanes);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          const float value = xr[t * step + j];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[t][r] += value * wv[r];
        }
      }
    }
  }
  const int64_t channels = std::min<int64_t>(R * kLanes, s.co - c);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    Vec sums[R];  // a copy, so that `acc` itself stays in registers
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = acc[t][r];
    std::memcpy(y + t * s.dilation * s.co, sums, channels * 4);
  }
}

// Sums x[pixel, q0 + t] * g[pixel, c + r] over the pixels of an image, for T values of q and R vectors of channels.
template <int T, int R>
void GradTile(const Shape& s, const float* x, const float* g, float* dw) {
  const int64_t row = s.frame_w() * s.ci * s.stride, step = s.stride * s.ci, wide = s.padded();
  Vec acc[T][R] = {};
  for (int64_t oy = 0; oy < s.oh; ++oy) {
    const float* xr = x + oy * row;
    for (int64_t ox = 0; ox < s.ow; ++ox, xr += step, g += wide) {
      Vec gv[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) gv[r] = Load(g + r * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const float value = xr[t];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[t][r] += value * gv[r];
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec* to = reinterpret_cast<Vec*>(dw + t * wide + r * kLanes);
      *to = *to + acc[t][r];
    }
  }
}

// Adds g[pixel, :] . w[c, q0 + vector] of T pixels of one row to the frame's row, where pixel's window begins; R vectors of q.
template <int T, int R>
void SpreadTile(const Shape& s, const float* g, const float* w, float* frame) {
  const int64_t step = s.stride * s.ci, wide = s.spread();
  Vec acc[T][R] = {};
  for (int64_t c = 0; c < s.co; ++c, w += wide) {
    Vec wv[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) wv[r] = Load(w + r * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const float value = g[t * s.co + c];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[t][r] += value * wv[r];
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec* to = reinterpret_cast<Vec*>(frame + t * step + r * kLanes);
      *to = *to + acc[t][r];
    }
  }
}

// Cuts `length` into near-equal pieces of at most Max and calls f(start, piece) with the piece as a constant.
template <int Max, template <int> class F, class... Args>
void Pieces(int64_t length, Args&&... args) {
  const int64_t pieces = (length + Max - 1) / Max;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t start = length * i / pieces;
    F<Max>::Call(static_cast<int>(length * (i + 1) / pieces - start), start, args...);
  }
}

template <int R>
struct Conv {
  template <int T>
  struct Tile {
    static void Call(int size, int64_t start, const Shape& s, const Taps& taps, const float* x, const float* w, float* y,
                     int64_t c) {
      if (size == T) {
        const int64_t column = start * s.dilation;
        ConvTile<T, R>(s, taps, x + column * s.stride * s.ci, w, y + column * s.co, c);
      } else if constexpr (T > 1) {
        Tile<T - 1>::Call(size, start, s, taps, x, w, y, c);
      }
    }
  };
};

template <int R>
struct Grad {
  template <int T>
  struct Tile {
    static void Call(int size, int64_t start, const Shape& s, const float* x, const float* g, float* dw) {
      if (size == T) {
        GradTile<T, R>(s, x + start, g, dw + start * s.padded());
      } else if constexpr (T > 1) {
        Tile<T - 1>::Call(size, start, s, x, g, dw);
      }
    }
  };
};

template <int R>
struct Spread {
  template <int T>
  struct Tile {
    static void Call(int size, int64_t start, const Shape& s, const float* g, const float* w, float* frame) {
      if (size == T) {
        SpreadTile<T, R>(s, g + start * s.co, w, frame + start * s.stride * s.ci);
      } else if constexpr (T > 1) {
        Tile<T - 1>::Call(size, start, s, g, w, frame);
      }
    }
  };
};

// Calls f(first vector, number of vectors) for blocks of 4, 2 and 1 vectors of output channels.
template <class F>
void Blocks(int64_t vectors, F f) {
  for (int64_t v = 0; v < vectors;) {
    const int64_t size = vectors - v >= 4 ? 4 : vectors - v >= 2 ? 2 : 1;
    f(v * kLanes, size);
    v += size;
  }
}

void ConvImage(const Shape& s, const float* x, const float* w, float* y) {
  const int64_t row = s.frame_w() * s.ci, d = s.dilation;
  Blocks(s.padded() / kLanes, [&](int64_t c, int64_t size) {
    for (int64_t oy = 0; oy < s.oh; ++oy) {
      const int64_t above = s.top - oy * s.stride;  // rows of the window before the image's first
      const int64_t begin = above > 0 ? above : (above % d + d) % d;
      const int64_t end = std::min(s.kh, above + (s.h - 1) * d + 1);
      for (int64_t phase = 0; phase < std::min(d, s.ow); ++phase) {
        const Taps taps{begin, end, ((s.left - phase) % d + d) % d};
        const int64_t columns = (s.ow - phase + d - 1) / d;
        const float* xr = x + oy * s.stride * row + phase * s.ci;
        float* yr = y + (oy * s.ow + phase) * s.co + c;
        if (size == 4) Pieces<kTile4, Conv<4>::Tile>(columns, s, taps, xr, w + c, yr, c);
        if (size == 2) Pieces<kTile2, Conv<2>::Tile>(columns, s, taps, xr, w + c, yr, c);
        if (size == 1) Pieces<kTile1, Conv<1>::Tile>(columns, s, taps, xr, w + c, yr, c);
      }
    }
  });
}

void GradImage(const Shape& s, const float* x, const float* g, float* dw) {
  const int64_t row = s.frame_w() * s.ci, wide = s.padded();
  Blocks(wide / kLanes, [&](int64_t c, int64_t size) {
    for (int64_t ky = 0; ky < s.kh; ++ky) {
      float* to = dw + ky * s.q() * wide + c;
      if (size == 4) Pieces<kTile4, Grad<4>::Tile>(s.q(), s, x + ky * row, g + c, to);
      if (size == 2) Pieces<kTile2, Grad<2>::Tile>(s.q(), s, x + ky * row, g + c, to);
      if (size == 1) Pieces<kTile1, Grad<1>::Tile>(s.q(), s, x + ky * row, g + c, to);
    }
  });
}

// The transpose of ConvImage: each pixel of g adds its window to the frame. `w` is [kh, co, q in whole vectors].
void SpreadImage(const Shape& s, const float* g, const float* w, float* frame) {
  const int64_t row = s.frame_w() * s.ci, wide = s.spread();
  for (int64_t ky = 0; ky < s.kh; ++ky) {
    Blocks(wide / kLanes, [&](int64_t q, int64_t size) {
      const float* wk = w + ky * s.co * wide + q;
      for (int64_t oy = 0; oy < s.oh; ++oy) {
        const float* gr = g + oy * s.ow * s.co;
        float* to = frame + (oy * s.stride + ky) * row + q;
        if (size == 4) Pieces<kTile4, Spread<4>::Tile>(s.ow, s, gr, wk, to);
        if (size == 2) Pieces<kTile2, Spread<2>::Tile>(s.ow, s, gr, wk, to);
        if (size == 1) Pieces<kTile1, Spread<1>::Tile>(s.ow, s, gr, wk, to);
      }
    });
  }
}

// True if none of n floats is NaN or infinite.
bool Finite(const float* x, int64_t n) {
  uint32_t odd = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    odd |= (bits & 0x7F800000) == 0x7F800000;
  }
  return !odd;
}

// f(output pixel, row and column of the kernel, image pixel) for all that meet: the zeros between and around pixels do not.
template <class F>
void Meetings(const Shape& s, F f) {
  const auto along = [&s](int64_t frame, int64_t size) { return frame % s.dilation ? size : frame / s.dilation; };
  for (int64_t oy = 0; oy < s.oh; ++oy) {
    for (int64_t ky = 0; ky < s.kh; ++ky) {
      const int64_t fy = oy * s.stride + ky - s.top, iy = along(fy, s.h);
      if (fy < 0 || iy >= s.h) continue;
      for (int64_t ox = 0; ox < s.ow; ++ox) {
        for (int64_t kx = 0; kx < s.kw; ++kx) {
          const int64_t fx = ox * s.stride + kx - s.left, ix = along(fx, s.w);
          if (fx >= 0 && ix < s.w) f(oy * s.ow + ox, ky * s.kw + kx, iy * s.w + ix);
        }
      }
    }
  }
}

// What ConvImage, GradImage and SpreadImage compute, by pairs of pixels: x [h, w, ci], y and g [oh, ow, co], w [kh, kw, ci, co].
void ExactConv(const Shape& s, const float* x, const float* w, float* y) {
  std::fill(y, y + s.oh * s.ow * s.co, 0.f);
  Meetings(s, [&](int64_t out, int64_t tap, int64_t in) {
    for (int64_t i = 0; i < s.ci; ++i)
      for (int64_t o = 0; o < s.co; ++o) y[out * s.co + o] += x[in * s.ci + i] * w[(tap * s.ci + i) * s.co + o];
  });
}

void ExactGrad(const Shape& s, const float* x, const float* g, float* dw) {
  Meetings(s, [&](int64_t out, int64_t tap, int64_t in) {
    for (int64_t i = 0; i < s.ci; ++i)
      for (int64_t o = 0; o < s.co; ++o) dw[(tap * s.ci + i) * s.padded() + o] += x[in * s.ci + i] * g[out * s.co + o];
  });
}

void ExactSpread(const Shape& s, const float* g, const float* w, float* dx) {
  std::fill(dx, dx + s.h * s.w * s.ci, 0.f);
  Meetings(s, [&](int64_t out, int64_t tap, int64_t in) {
    for (int64_t i = 0; i < s.ci; ++i)
      for (int64_t o = 0; o < s.co; ++o) dx[in * s.ci + i] += g[out * s.co + o] * w[(tap * s.ci + i) * s.co + o];
  });
}

using Array = ffi::Buffer<ffi::F32, 4>;
using Out = ffi::Result<Array>;

ffi::Error ConvHandler(ffi::ThreadPool pool, Array x, Array k, Out y, int64_t stride, int64_t top, int64_t left,
                       int64_t dilation) {
  const auto xd = x.dimensions(), kd = k.dimensions(), yd = y->dimensions();
  const Shape s{xd[1], xd[2], xd[3], kd[0], kd[1], yd[1], yd[2], yd[3], stride, top, left, dilation};
  if (kd[2] != s.ci || kd[3] != s.co || yd[0] != xd[0]) return ffi::Error::InvalidArgument("convolution: shapes disagree");
  if (stride > 1 && dilation > 1) return ffi::Error::InvalidArgument("convolution: stride and dilation exclude each other");
  std::vector<float> packed;
  const float* w = PadRows(k.typed_data(), s.kh * s.q(), s.co, s.padded(), packed);
  const float *from = x.typed_data(), *plain = k.typed_data();
  float* to = y->typed_data();
  const bool finite = Finite(plain, s.kh * s.q() * s.co);
  compressx::Parallel(pool, xd[0], [=, &s](int64_t i) {
    if (!finite) return ExactConv(s, from + i * s.h * s.w * s.ci, plain, to + i * s.oh * s.ow * s.co);
    thread_local std::vector<float> frame;
    ConvImage(s, Frame(s, from + i * s.h * s.w * s.ci, frame), w, to + i * s.oh * s.ow * s.co);
  });
  return ffi::Error::Success();
}

ffi::Error GradHandler(ffi::ThreadPool pool, Array x, Array g, Out dk, int64_t stride, int64_t top, int64_t left,
                       int64_t dilation) {
  const auto xd = x.dimensions(), gd = g.dimensions(), kd = dk->dimensions();
  const Shape s{xd[1], xd[2], xd[3], kd[0], kd[1], gd[1], gd[2], gd[3], stride, top, left, dilation};
  if (kd[2] != s.ci || kd[3] != s.co || gd[0] != xd[0]) return ffi::Error::InvalidArgument("weight gradient: shapes disagree");
  // The sum over images is cut into parts by its size alone, so that the result does not depend on the threads.
  const int64_t n = xd[0], rows = s.kh * s.q(), wide = s.padded(), size = rows * wide;
  const int64_t parts = std::max<int64_t>(1, std::min({n, int64_t{16}, (int64_t{1} << 23) / std::max<int64_t>(1, size)}));
  std::vector<float> sums(parts * size, 0.f);
  const float *from = x.typed_data(), *cotangent = g.typed_data();
  const int64_t pixels = s.oh * s.ow;
  float* partial = sums.data();
  const auto add = [&](bool exact) {
    compressx::Parallel(pool, parts, [=, &s](int64_t part) {
      thread_local std::vector<float> frame, padded;
      float* sum = partial + part * size;
      for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
        const float *image = from + i * s.h * s.w * s.ci, *gi = cotangent + i * pixels * s.co;
        if (exact) {
          ExactGrad(s, image, gi, sum);
        } else {
          GradImage(s, Frame(s, image, frame), PadRows(gi, pixels, s.co, wide, padded), sum);
        }
      }
    });
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < size; ++i) partial[i] += partial[part * size + i];
    }
  };
  add(false);
  if (!Finite(partial, size) && !Finite(cotangent, n * pixels * s.co)) {
    std::fill(sums.begin(), sums.end(), 0.f);
    add(true);
  }
  for (int64_t i = 0; i < rows; ++i) std::memcpy(dk->typed_data() + i * s.co, partial + i * wide, s.co * 4);
  return ffi::Error::Success();
}

// The gradient for the images by spreading: no multiplication with the zeros around g, and few lanes idle where ci is small.
ffi::Error SpreadHandler(ffi::ThreadPool pool, Array g, Array k, Out dx, int64_t stride, int64_t top, int64_t left,
                         int64_t dilation) {
  const auto gd = g.dimensions(), kd = k.dimensions(), xd = dx->dimensions();
  const Shape s{xd[1], xd[2], xd[3], kd[0], kd[1], gd[1], gd[2], gd[3], stride, top, left, dilation};
  if (kd[2] != s.ci || kd[3] != s.co || gd[0] != xd[0]) return ffi::Error::InvalidArgument("input gradient: shapes disagree");
  if (dilation != 1) return ffi::Error::InvalidArgument("input gradient: no dilation");
  const int64_t wide = s.spread();
  std::vector<float> packed(s.kh * s.co * wide, 0.f);
  for (int64_t ky = 0; ky < s.kh; ++ky) {
    for (int64_t q = 0; q < s.q(); ++q) {
      const float* from = k.typed_data() + (ky * s.q() + q) * s.co;
      for (int64_t c = 0; c < s.co; ++c) packed[(ky * s.co + c) * wide + q] = from[c];
    }
  }
  const float *from = g.typed_data(), *w = packed.data(), *plain = k.typed_data();
  float* to = dx->typed_data();
  compressx::Parallel(pool, xd[0], [=, &s](int64_t i) {
    thread_local std::vector<float> frame;
    const int64_t fw = s.frame_w() * s.ci;
    frame.assign(s.frame_h() * fw + kLanes, 0.f);  // the last window's idle lanes
    const float* gi = from + i * s.oh * s.ow * s.co;
    SpreadImage(s, gi, w, frame.data());
    const int64_t columns = std::min(s.w, s.frame_w() - s.left), rows = std::min(s.h, s.frame_h() - s.top);
    float* image = to + i * s.h * s.w * s.ci;
    if (rows < s.h || columns < s.w) std::memset(image, 0, s.h * s.w * s.ci * 4);
    for (int64_t y = 0; y < rows; ++y) {
      std::memcpy(image + y * s.w * s.ci, frame.data() + (s.top + y) * fw + s.left * s.ci, columns * s.ci * 4);
    }
    // the idle lanes of a vector add zeros times g to the next pixels
    if (!Finite(image, s.h * s.w * s.ci) && !Finite(gi, s.oh * s.ow * s.co)) ExactSpread(s, gi, plain, image);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxConv, ConvHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left")
                                  .Attr<int64_t>("dilation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxConvGrad, GradHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left")
                                  .Attr<int64_t>("dilation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxConvSpread, SpreadHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left")
                                  .Attr<int64_t>("dilation"));
