// MABN's operators on a CPU: torch.ops.mabn_d2_cpu. Their callers, where torch's own kernels do the
// same elsewhere, are kernels.py and functional.py, whose docstrings say what each computes.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "passes.h"

namespace mabn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread
constexpr int64_t kRows = 256;       // pixels of a piece in channels-last

// A dense activation, cut into pieces that lie in one image: a plane, or some pixels of it. The
// number of pieces, and so the rounding of sums, does not depend on the number of threads.
struct Layout {
  int64_t images, channels, pixels, rows, per_image;
  bool channels_last;

  explicit Layout(const Tensor& x) {
    TORCH_CHECK(x.device().is_cpu(), "expected a CPU tensor, got one on ", x.device());
    TORCH_CHECK(x.dim() == 4, "expected (N, C, H, W), got ", x.sizes());
    images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    channels_last = !x.is_contiguous();
    TORCH_CHECK(!channels_last || x.is_contiguous(at::MemoryFormat::ChannelsLast),
                "expected a tensor that is contiguous or channels-last, got strides ", x.strides());
    cut();
  }

  void cut() {
    rows = channels_last ? kRows : pixels;
    per_image = channels_last ? (pixels + rows - 1) / rows : channels;
  }

  // In channels-last pieces may span images where factors are the same for all.
  void join_images() {
    pixels *= images;
    images = 1;
    cut();
  }

  // function(image, piece, offset, size): the piece's first element, and its rows, or elements.
  template <typename F>
  void for_each_piece(const F& function) const {
    const int64_t size = channels_last ? rows * channels : pixels;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1));
    at::parallel_for(0, images * per_image, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t image = k / per_image, piece = k % per_image, first = piece * rows;
        if (channels_last) {
          function(image, piece, (image * pixels + first) * channels,
                   std::min(rows, pixels - first));
        } else {
          function(image, piece, k * pixels, pixels);
        }
      }
    });
  }
};

void check_like(const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK(tensor.sizes() == x.sizes() && tensor.strides() == x.strides() &&
                  tensor.scalar_type() == x.scalar_type() && tensor.device() == x.device(),
              "expected two tensors of the same shape, strides, dtype and device");
}

// Per-channel factors: (C,), or (N, C) with a row for each image.
struct Factors {
  const float* data = nullptr;
  int64_t stride = 0;

  Factors(const OptionalTensor& vector, const Layout& layout) {
    if (!vector) return;
    const bool rows = vector->dim() == 2;
    TORCH_CHECK(vector->device().is_cpu() && vector->scalar_type() == at::kFloat &&
                    vector->is_contiguous() && vector->numel() ==
                        layout.channels * (rows ? layout.images : 1),
                "expected a contiguous float32 vector (C,) or (N, C)");
    data = vector->data_ptr<float>();
    stride = rows ? layout.channels : 0;
  }

  const float* row(int64_t image) const { return data ? data + image * stride : nullptr; }
  float at(int64_t image, int64_t channel) const {
    return data ? data[image * stride + channel] : 0;
  }
};

template <typename T>
T* data(const Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data_ptr());
}

// function(T(), relu) with T the type of the elements and relu a compile-time boolean.
template <typename F>
void dispatch(const Tensor& x, bool relu, const F& function) {
  const auto with = [&](auto element) {
    relu ? function(element, std::true_type()) : function(element, std::false_type());
  };
  switch (x.scalar_type()) {
    case at::kFloat: return with(float());
    case at::kBFloat16: return with(BFloat16());
    default: TORCH_CHECK(false, "expected float32 or bfloat16, got ", x.scalar_type());
  }
}

Tensor affine(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu) {
  const Layout layout(x);
  const Factors scales(scale, layout), shifts(shift, layout);
  const Tensor y = at::empty_like(x);
  dispatch(x, relu, [&](auto element, auto gated) {
    using T = decltype(element);
    constexpr bool kRelu = decltype(gated)::value;
    layout.for_each_piece([&](int64_t image, int64_t piece, int64_t offset, int64_t size) {
      const T* in = data<T>(x) + offset;
      T* out = data<T>(y) + offset;
      if (layout.channels_last) {
        affine_rows<T, kRelu>(in, scales.row(image), shifts.row(image), out, size, layout.channels);
      } else {
        affine_plane<T, kRelu>(in, scales.at(image, piece), shifts.at(image, piece), out, size);
      }
    });
  });
  return y;
}

Tensor combine(const Tensor& dy, const Tensor& x, const Tensor& dy_scale, const Tensor& scale,
               const OptionalTensor& shift, const OptionalTensor& relu_shift) {
  const Layout layout(x);
  check_like(dy, x);
  const Tensor zero = shift ? *shift : at::zeros_like(scale);
  const Factors dy_scales(dy_scale, layout), scales(scale, layout), shifts(zero, layout),
      relu_shifts(relu_shift, layout);
  const Tensor dx = at::empty_like(x);
  dispatch(x, relu_shift.has_value(), [&](auto element, auto gated) {
    using T = decltype(element);
    constexpr bool kRelu = decltype(gated)::value;
    layout.for_each_piece([&](int64_t n, int64_t c, int64_t offset, int64_t size) {
      const T *g = data<T>(dy) + offset, *in = data<T>(x) + offset;
      T* out = data<T>(dx) + offset;
      if (layout.channels_last) {
        combine_rows<T, kRelu>(g, in, dy_scales.row(n), scales.row(n), shifts.row(n),
                               relu_shifts.row(n), out, size, layout.channels);
      } else {
        combine_plane<T, kRelu>(g, in, dy_scales.at(n, c), scales.at(n, c), shifts.at(n, c),
                                relu_shifts.at(n, c), out, size);
      }
    });
  });
  return dx;
}

// sums[k] += the sums of one group of `count` consecutive rows of partial (rows, 2, C).
std::tuple<Tensor, Tensor> add_rows(const Tensor& partial, int64_t groups, bool flat) {
  const int64_t count = partial.size(0) / std::max<int64_t>(groups, 1);
  const int64_t channels = partial.size(2);
  const auto make = [&] {
    return flat ? at::empty({channels}, partial.options())
                : at::empty({groups, channels}, partial.options());
  };
  const Tensor products = make(), totals = make();
  const float* in = partial.data_ptr<float>();
  float* out[2] = {products.data_ptr<float>(), totals.data_ptr<float>()};
  std::vector<double> sums(channels);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t kind = 0; kind < 2; ++kind) {
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t row = group * count; row < (group + 1) * count; ++row) {
        const float* from = in + (row * 2 + kind) * channels;
        for (int64_t c = 0; c < channels; ++c) sums[c] += from[c];
      }
      for (int64_t c = 0; c < channels; ++c) out[kind][group * channels + c] = float(sums[c]);
    }
  }
  return {products, totals};
}

std::tuple<Tensor, Tensor> product_sums(const Tensor& dy, const Tensor& x, bool per_image,
                                        const OptionalTensor& relu_scale,
                                        const OptionalTensor& relu_shift) {
  Layout layout(x);
  check_like(dy, x);
  TORCH_CHECK(relu_scale.has_value() == relu_shift.has_value(), "a ReLU has scale and shift");
  const Factors scales(relu_scale, layout), shifts(relu_shift, layout);
  if (!per_image && layout.channels_last && scales.stride == 0 && shifts.stride == 0) {
    layout.join_images();
  }
  const int64_t pieces = layout.channels_last ? layout.per_image : 1;
  const Tensor partial =
      at::empty({layout.images * pieces, 2, layout.channels}, x.options().dtype(at::kFloat));
  float* sums = partial.data_ptr<float>();
  dispatch(x, relu_scale.has_value(), [&](auto element, auto gated) {
    using T = decltype(element);
    constexpr bool kRelu = decltype(gated)::value;
    layout.for_each_piece([&](int64_t n, int64_t piece, int64_t offset, int64_t size) {
      const T *g = data<T>(dy) + offset, *in = data<T>(x) + offset;
      float* row = sums + (n * pieces + (layout.channels_last ? piece : 0)) * 2 * layout.channels;
      if (layout.channels_last) {
        sums_rows<T, kRelu>(g, in, scales.row(n), shifts.row(n), row, row + layout.channels, size,
                            layout.channels);
      } else {
        sums_plane<T, kRelu>(g, in, scales.at(n, piece), shifts.at(n, piece), row + piece,
                             row + layout.channels + piece, size);
      }
    });
  });
  return add_rows(partial, per_image ? layout.images : 1, !per_image);
}

bool all_finite(const float* vector, int64_t size) {
  return std::all_of(vector, vector + size, [](float value) { return std::isfinite(value); });
}

void check_vector(const Tensor& tensor, int64_t size) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == at::kFloat &&
                  tensor.is_contiguous() && tensor.numel() == size,
              "expected a contiguous float32 CPU tensor of ", size, " elements");
}

void check_flag(const Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == dtype && tensor.numel() == 1,
              "expected one element of ", dtype, " on a CPU");
}

// window[slot] <- value unless `keep`; mean <- the mean of the rows, `value` among them or not.
void push(float* window, int64_t length, int64_t channels, int64_t slot, const float* value,
          bool keep, bool write, float* mean) {
  std::fill(mean, mean + channels, 0);
  for (int64_t row = 0; row < length; ++row) {
    float* stored = window + row * channels;
    if (row == slot && !keep && write) std::copy(value, value + channels, stored);
    const float* from = row == slot && !keep ? value : stored;
    for (int64_t c = 0; c < channels; ++c) mean[c] += from[c];
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] /= float(length);
}

// functional.advance, with the acceptance of the input and its counters.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> advance(
    const Tensor& x2, Tensor window, Tensor running_var, Tensor iters, Tensor rejected, double eps_,
    double momentum, int64_t warmup_iters, int64_t clip_start, double clip_limit, bool counts) {
  const int64_t channels = x2.numel(), length = window.size(0);
  check_vector(x2, channels);
  check_vector(running_var, channels);
  check_vector(window, length * channels);
  check_flag(iters, at::kLong);
  check_flag(rejected, at::kLong);
  const Tensor var_ = at::empty_like(x2), r_ = at::empty_like(x2), slot_ = at::empty_like(iters);
  const Tensor plain_ = at::empty({1}, x2.options().dtype(at::kBool)),
               counted = at::empty({1}, x2.options().dtype(at::kBool));
  const float *in = x2.data_ptr<float>(), eps = float(eps_);
  float *var = var_.data_ptr<float>(), *r = r_.data_ptr<float>(),
        *running = running_var.data_ptr<float>();

  const bool accepted = all_finite(in, channels);
  const int64_t t = *iters.data_ptr<int64_t>() + 1, slot = t % length;
  const bool plain = t <= std::max(length, warmup_iters - 1);
  push(window.data_ptr<float>(), length, channels, slot, in, !accepted, counts, var);
  if (plain) std::copy(in, in + channels, var);
  const bool clipped = t > std::max(clip_start, warmup_iters);
  const float low = float(1 / clip_limit), high = float(clip_limit), moves = float(1 - momentum);
  for (int64_t c = 0; c < channels; ++c) {
    const float ratio = std::sqrt((var[c] + eps) / (running[c] + eps));
    // NaN passes, as through torch's clamp.
    r[c] = !clipped ? 1 : ratio < low ? low : ratio > high ? high : ratio;
    if (counts && accepted) running[c] += moves * (var[c] - running[c]);
  }
  *slot_.data_ptr<int64_t>() = slot;
  *plain_.data_ptr<bool>() = plain;
  *counted.data_ptr<bool>() = counts;
  if (counts) *(accepted ? iters : rejected).data_ptr<int64_t>() += 1;
  return {var_, r_, slot_, plain_, counted};
}

// var + eps, r / sqrt(var + eps) and weight times that.
std::tuple<Tensor, Tensor, Tensor> scales(const Tensor& var, const Tensor& r, const Tensor& weight,
                                          double eps) {
  const int64_t channels = var.numel();
  for (const Tensor& vector : {var, r, weight}) check_vector(vector, channels);
  const Tensor shifted = at::empty_like(var), r_std = at::empty_like(var),
               scale = at::empty_like(var);
  for (int64_t c = 0; c < channels; ++c) {
    const float v = var.data_ptr<float>()[c] + float(eps);
    const float s = r.data_ptr<float>()[c] / std::sqrt(v);
    shifted.data_ptr<float>()[c] = v;
    r_std.data_ptr<float>()[c] = s;
    scale.data_ptr<float>()[c] = s * weight.data_ptr<float>()[c];
  }
  return {shifted, r_std, scale};
}

// The factor of x in dx, -psi / var, and dweight, from dyx = sum(dy * x) over `count` elements.
std::tuple<Tensor, Tensor> backward_scales(const Tensor& dyx, const Tensor& scale,
                                           const Tensor& var, const Tensor& r_std, Tensor window,
                                           const Tensor& slot, const Tensor& plain,
                                           int64_t count) {
  const int64_t channels = dyx.numel(), length = window.size(0);
  for (const Tensor& vector : {dyx, scale, var, r_std}) check_vector(vector, channels);
  check_vector(window, length * channels);
  check_flag(slot, at::kLong);
  check_flag(plain, at::kBool);
  const Tensor psi_ = at::empty_like(dyx), dweight_ = at::empty_like(dyx);
  const Tensor mean = at::empty_like(dyx);
  float *psi = psi_.data_ptr<float>(), *dweight = dweight_.data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const float sum = dyx.data_ptr<float>()[c];
    psi[c] = sum * scale.data_ptr<float>()[c] / float(count);
    dweight[c] = sum * r_std.data_ptr<float>()[c];
  }
  push(window.data_ptr<float>(), length, channels, *slot.data_ptr<int64_t>(), psi,
       !all_finite(psi, channels), true, mean.data_ptr<float>());
  const float* chosen = *plain.data_ptr<bool>() ? psi : mean.data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) psi[c] = -chosen[c] / var.data_ptr<float>()[c];
  return {psi_, dweight_};
}

}  // namespace

TORCH_LIBRARY(mabn_d2_cpu, library) {
  library.def("affine(Tensor x, Tensor scale, Tensor shift, bool relu=False) -> Tensor");
  library.def("combine(Tensor dy, Tensor x, Tensor dy_scale, Tensor scale, Tensor? shift=None, "
              "Tensor? relu_shift=None) -> Tensor");
  library.def("product_sums(Tensor dy, Tensor x, bool per_image=False, Tensor? relu_scale=None, "
              "Tensor? relu_shift=None) -> (Tensor, Tensor)");
  library.def("advance(Tensor x2, Tensor(a!) window, Tensor(b!) running_var, Tensor(c!) iters, "
              "Tensor(d!) rejected, float eps, float momentum, int warmup_iters, int clip_start, "
              "float clip_limit, bool counts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("scales(Tensor var, Tensor r, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  library.def("backward_scales(Tensor dyx, Tensor scale, Tensor var, Tensor r_std, "
              "Tensor(a!) window, Tensor slot, Tensor plain, int count) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mabn_d2_cpu, CPU, library) {
  library.impl("affine", affine);
  library.impl("combine", combine);
  library.impl("product_sums", product_sums);
  library.impl("advance", advance);
  library.impl("scales", scales);
  library.impl("backward_scales", backward_scales);
}

// Gradients are the caller's business. Without this each call would pass torch's slow default.
TORCH_LIBRARY_IMPL(mabn_d2_cpu, Autograd, library) {
  for (const char* name :
       {"affine", "combine", "product_sums", "advance", "scales", "backward_scales"}) {
    library.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace mabn
