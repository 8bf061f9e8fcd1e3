// Depthwise convolution and its two gradients, float32, NHWC, as XLA FFI handlers.
//
// Every channel has its own filter, so all three are sums over taps of products of whole rows of channels: a tap takes
// one pixel of one operand to one pixel of the other, and the loop over the channels of both is the vectors' axis.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Array = ffi::Buffer<ffi::F32>;
using Out = ffi::Result<ffi::Buffer<ffi::F32>>;

struct Tap {
  int64_t pixel, tap;  // along one axis: index into the other operand, and of the filter
};

// For each of `outputs` positions along an axis, the taps that meet one of `inputs`. Forwards an output reads the inputs
// stride * output - pad + tap; `back` is the transposed relation, of the gradient for the images.
std::vector<std::vector<Tap>> Meetings(int64_t outputs, int64_t inputs, int64_t taps, int64_t stride, int64_t pad, bool back) {
  std::vector<std::vector<Tap>> all(outputs);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t t = 0; t < taps; ++t) {
      int64_t at = stride * o - pad + t;
      if (back) {
        at = o + pad - t;
        if (at % stride) continue;
        at /= stride;
      }
      if (at >= 0 && at < inputs) all[o].push_back({at, t});
    }
  }
  return all;
}

// Rows of `c` channels: to += from * weight.
inline void Accumulate(const float* __restrict from, const float* __restrict weight, float* __restrict to, int64_t c) {
  for (int64_t i = 0; i < c; ++i) to[i] += from[i] * weight[i];
}

ffi::Error Apply(ffi::ThreadPool pool, Array x, Array k, Out y, int64_t stride, int64_t top, int64_t left, bool back) {
  const auto xd = x.dimensions(), kd = k.dimensions(), yd = y->dimensions();
  const int64_t c = xd[3], h = yd[1], w = yd[2];
  if (kd[2] != 1 || kd[3] != c || yd[3] != c || xd[0] != yd[0]) return ffi::Error::InvalidArgument("shapes disagree");
  const auto rows = Meetings(h, xd[1], kd[0], stride, top, back), columns = Meetings(w, xd[2], kd[1], stride, left, back);
  const float *from = x.typed_data(), *weight = k.typed_data();
  float* to = y->typed_data();
  compressx::Parallel(pool, yd[0], [&, from, weight, to](int64_t image) {
    const float* in = from + image * xd[1] * xd[2] * c;
    float* out = to + image * h * w * c;
    std::fill(out, out + h * w * c, 0.f);
    for (int64_t i = 0; i < h; ++i) {
      for (int64_t j = 0; j < w; ++j, out += c) {
        for (const Tap& a : rows[i]) {
          for (const Tap& b : columns[j]) {
            Accumulate(in + (a.pixel * xd[2] + b.pixel) * c, weight + (a.tap * kd[1] + b.tap) * c, out, c);
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error ForwardHandler(ffi::ThreadPool pool, Array x, Array k, Out y, int64_t stride, int64_t top, int64_t left) {
  return Apply(pool, x, k, y, stride, top, left, false);
}

ffi::Error InputGradHandler(ffi::ThreadPool pool, Array g, Array k, Out dx, int64_t stride, int64_t top, int64_t left) {
  return Apply(pool, g, k, dx, stride, top, left, true);
}

ffi::Error KernelGradHandler(ffi::ThreadPool pool, Array x, Array g, Out dk, int64_t stride, int64_t top, int64_t left) {
  const auto xd = x.dimensions(), gd = g.dimensions(), kd = dk->dimensions();
  const int64_t n = xd[0], c = xd[3], size = kd[0] * kd[1] * c;
  if (kd[2] != 1 || kd[3] != c || gd[3] != c || gd[0] != n) return ffi::Error::InvalidArgument("shapes disagree");
  const auto rows = Meetings(gd[1], xd[1], kd[0], stride, top, false), columns = Meetings(gd[2], xd[2], kd[1], stride, left, false);
  // The sum over images is cut into parts by its size alone, so that the result does not depend on the threads.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(n, 16));
  std::vector<float> sums(parts * size, 0.f);
  float* partial = sums.data();
  const float *from = x.typed_data(), *cotangent = g.typed_data();
  compressx::Parallel(pool, parts, [&, from, cotangent, partial](int64_t part) {
    float* sum = partial + part * size;
    for (int64_t image = n * part / parts; image < n * (part + 1) / parts; ++image) {
      const float* in = from + image * xd[1] * xd[2] * c;
      const float* out = cotangent + image * gd[1] * gd[2] * c;
      for (int64_t i = 0; i < gd[1]; ++i) {
        for (int64_t j = 0; j < gd[2]; ++j, out += c) {
          for (const Tap& a : rows[i]) {
            for (const Tap& b : columns[j]) {
              Accumulate(in + (a.pixel * xd[2] + b.pixel) * c, out, sum + (a.tap * kd[1] + b.tap) * c, c);
            }
          }
        }
      }
    }
  });
  float* to = dk->typed_data();
  std::copy(partial, partial + size, to);
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) to[i] += partial[part * size + i];
  }
  return ffi::Error::Success();
}

auto Bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Array>()
      .Arg<Array>()
      .Ret<Array>()
      .Attr<int64_t>("stride")
      .Attr<int64_t>("top")
      .Attr<int64_t>("left");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxDepthwise, ForwardHandler, Bind());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxDepthwiseInputGrad, InputGradHandler, Bind());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CompressxDepthwiseKernelGrad, KernelGradHandler, Bind());
