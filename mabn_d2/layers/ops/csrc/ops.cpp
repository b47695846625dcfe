#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

namespace mabn {

Tensor affine_of_groups(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu,
                        int64_t size) {
  const Layout layout(x);
  const Factors scales(scale, layout, size), shifts(shift, layout, size);
  const Tensor y = at::empty_like(x);
  dispatch(x, relu, [&](auto element, auto gated) {
    using T = decltype(element);
    constexpr bool kRelu = decltype(gated)::value;
    layout.for_each_piece([&](int64_t n, int64_t first, int64_t count, int64_t offset) {
      const T* in = data<T>(x) + offset;
      T* out = data<T>(y) + offset;
      if (layout.channels_last) {
        affine_pixels<T, kRelu>(in, scales.of(n), shifts.of(n), out, count, layout.channels);
      } else {
        affine_planes<T, kRelu>(in, scales.of(n, first), shifts.of(n, first), out, count,
                                layout.pixels);
      }
    }, true);
  });
  return y;
}

Tensor combine_of_groups(const Tensor& dy, const Tensor& x, const Tensor& dy_scale,
                         const Tensor& scale, const OptionalTensor& shift,
                         const OptionalTensor& relu_shift, int64_t size) {
  const Layout layout(x);
  check_like(dy, x);
  const Tensor zero = shift ? *shift : at::zeros_like(scale);
  const Factors dy_scales(dy_scale, layout, size), scales(scale, layout, size),
      shifts(zero, layout, size), relu_shifts(relu_shift, layout, size);
  const Tensor dx = at::empty_like(x);
  dispatch(x, relu_shift.has_value(), [&](auto element, auto gated) {
    using T = decltype(element);
    constexpr bool kRelu = decltype(gated)::value;
    layout.for_each_piece([&](int64_t n, int64_t first, int64_t count, int64_t offset) {
      const T *g = data<T>(dy) + offset, *in = data<T>(x) + offset;
      T* out = data<T>(dx) + offset;
      if (layout.channels_last) {
        combine_pixels<T, kRelu>(g, in, dy_scales.of(n), scales.of(n), shifts.of(n),
                                 relu_shifts.of(n), out, count, layout.channels);
      } else {
        combine_planes<T, kRelu>(g, in, dy_scales.of(n, first), scales.of(n, first),
                                 shifts.of(n, first), relu_shifts.of(n, first), out, count,
                                 layout.pixels);
      }
    }, true);
  });
  return dx;
}

namespace {

// Adds the rows of partial (rows, 2, C). The rows are `groups` runs of equal length, and each run gives
// one row of both results, (groups, C). If `flat`, there is one run, and the results are (C,).
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

}  // namespace

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
    layout.for_each_piece([&](int64_t n, int64_t first, int64_t count, int64_t offset) {
      const T *g = data<T>(dy) + offset, *in = data<T>(x) + offset;
      const int64_t piece = layout.channels_last ? first / layout.rows : 0;
      float* row = sums + (n * pieces + piece) * 2 * layout.channels;
      if (layout.channels_last) {
        sums_pixels<T, kRelu>(g, in, scales.of(n), shifts.of(n), row, row + layout.channels, count,
                              layout.channels);
      } else {
        sums_planes<T, kRelu>(g, in, scales.of(n, first), shifts.of(n, first), row + first,
                              row + layout.channels + first, count, layout.pixels, false);
      }
    });
  });
  return add_rows(partial, per_image ? layout.images : 1, !per_image);
}

namespace {

Tensor affine(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu) {
  return affine_of_groups(x, scale, shift, relu, 1);
}

Tensor combine(const Tensor& dy, const Tensor& x, const Tensor& dy_scale, const Tensor& scale,
               const OptionalTensor& shift, const OptionalTensor& relu_shift) {
  return combine_of_groups(dy, x, dy_scale, scale, shift, relu_shift, 1);
}

}  // namespace

TORCH_LIBRARY(mabn_d2_cpu, library) {
  library.def("affine(Tensor x, Tensor scale, Tensor shift, bool relu=False) -> Tensor");
  library.def("combine(Tensor dy, Tensor x, Tensor dy_scale, Tensor scale, Tensor? shift=None, "
              "Tensor? relu_shift=None) -> Tensor");
  library.def("product_sums(Tensor dy, Tensor x, bool per_image=False, Tensor? relu_scale=None, "
              "Tensor? relu_shift=None) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mabn_d2_cpu, CPU, library) {
  library.impl("affine", affine);
  library.impl("combine", combine);
  library.impl("product_sums", product_sums);
}

// The caller computes the gradients. Without this, each call would pass through torch's slow default.
TORCH_LIBRARY_IMPL(mabn_d2_cpu, Autograd, library) {
  for (const char* name : {"affine", "combine", "product_sums"}) {
    library.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace mabn
