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
  // Backwards after a pass forwards, each thread begins with what it has in its cache.
  template <typename F>
  void for_each_piece(const F& function, bool backwards = false) const {
    const int64_t size = channels_last ? rows * channels : pixels;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1));
    at::parallel_for(0, images * per_image, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = backwards ? begin + end - 1 - i : i;
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
    }, true);
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
    }, true);
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

// The last statistics of each channel, (length, channels), of which `slot` is replaced next.
struct Window {
  float* data;
  int64_t length, channels, slot;

  Window(const Tensor& tensor, int64_t channels_, int64_t slot_)
      : data(tensor.data_ptr<float>()), length(tensor.size(0)), channels(channels_), slot(slot_) {
    check_vector(tensor, length * channels);
  }

  // The mean with `value` in the slot, if it is to enter.
  float mean(int64_t c, float value, bool enters) const {
    float sum = 0;
    for (int64_t row = 0; row < length; ++row) {
      sum += row == slot && enters ? value : data[row * channels + c];
    }
    return sum / float(length);
  }

  void push(const float* values) { std::copy(values, values + channels, data + slot * channels); }
};

// Sums of g * x and g, where g is dy behind the ReLU, if there is one, over a channel's planes.
template <typename T, bool relu>
void channel_sums(const T* dy, const T* x, const Layout& layout, int64_t c, float scale, float shift,
                  float* product, float* total) {
  double products = 0, totals = 0;
  for (int64_t n = 0; n < layout.images; ++n) {
    const int64_t offset = (n * layout.channels + c) * layout.pixels;
    float p, t;
    sums_plane<T, relu>(dy + offset, x + offset, scale, shift, &p, &t, layout.pixels);
    products += p;
    totals += t;
  }
  *product = float(products);
  *total = float(totals);
}

// function(c) for all channels of contiguous activations.
template <typename F>
void for_each_channel(const Layout& layout, const F& function) {
  const int64_t size = std::max<int64_t>(layout.images * layout.pixels, 1);
  at::parallel_for(0, layout.channels, std::max<int64_t>(1, kGrain / size),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t c = begin; c < end; ++c) function(c);
                   });
}

// The whole forward: y, what it was normalized by (mabn.py's Statistics), and var + eps,
// r / sqrt(var + eps) and weight times that.
//
// A channel's statistics need no other channel. So in contiguous activations each channel is mapped
// right after it was summed, while it is in the cache: one pass over memory in place of two. Whether
// the input is accepted is known after the last channel; if it is not, all are mapped once more.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize(
    const Tensor& x, const Tensor& weight, const Tensor& bias, Tensor window_, Tensor running_var,
    Tensor iters, Tensor rejected, double eps_, double momentum, int64_t warmup_iters,
    int64_t clip_start, double clip_limit, bool counts, bool relu) {
  const Layout layout(x);
  const int64_t channels = layout.channels, length = window_.size(0);
  for (const Tensor& vector : {weight, bias, running_var}) check_vector(vector, channels);
  check_flag(iters, at::kLong);
  check_flag(rejected, at::kLong);

  const int64_t t = *iters.data_ptr<int64_t>() + 1;
  Window window(window_, channels, t % length);
  const bool plain = t <= std::max(length, warmup_iters - 1);
  const bool clips = t > std::max(clip_start, warmup_iters);
  const float eps = float(eps_), low = float(1 / clip_limit), high = float(clip_limit);

  const auto vector = [&] { return at::empty({channels}, weight.options()); };
  const Tensor x2_ = vector(), var_ = vector(), r_ = vector(), shifted_ = vector(),
               r_std_ = vector(), scale_ = vector();
  const auto all = [](const Tensor& tensor) { return tensor.data_ptr<float>(); };
  float *x2 = all(x2_), *var = all(var_), *r = all(r_), *shifted = all(shifted_),
        *r_std = all(r_std_), *scale = all(scale_), *running = all(running_var);
  const float *w = all(weight), *b = all(bias);
  const auto choose = [&](int64_t c, bool accepted) {
    var[c] = plain ? x2[c] : window.mean(c, x2[c], accepted);
    shifted[c] = var[c] + eps;
    const float ratio = clips ? std::sqrt(shifted[c] / (running[c] + eps)) : 1;
    r[c] = ratio < low ? low : ratio > high ? high : ratio;  // NaN passes, as through torch's clamp
    r_std[c] = r[c] / std::sqrt(shifted[c]);
    scale[c] = r_std[c] * w[c];
  };

  Tensor y;
  const float count = float(layout.images * layout.pixels);
  if (layout.channels_last) {
    const Tensor sums = std::get<0>(product_sums(x, x, false, std::nullopt, std::nullopt));
    for (int64_t c = 0; c < channels; ++c) x2[c] = all(sums)[c] / count;
  } else {
    y = at::empty_like(x);
    dispatch(x, relu, [&](auto element, auto gated) {
      using T = decltype(element);
      const T* in = data<T>(x);
      T* out = data<T>(y);
      for_each_channel(layout, [&](int64_t c) {
        float product, total;
        channel_sums<T, false>(in, in, layout, c, 0, 0, &product, &total);
        x2[c] = product / count;
        choose(c, true);
        for (int64_t n = layout.images; n-- > 0;) {  // the last plane is the warmest
          const int64_t offset = (n * channels + c) * layout.pixels;
          affine_plane<T, decltype(gated)::value>(in + offset, scale[c], b[c], out + offset,
                                                  layout.pixels);
        }
      });
    });
  }
  const bool accepted = all_finite(x2, channels);
  if (layout.channels_last || !accepted) {
    for (int64_t c = 0; c < channels; ++c) choose(c, accepted);
    y = affine(x, scale_, bias, relu);
  }

  if (counts) {
    if (accepted) {
      window.push(x2);
      const float moves = float(1 - momentum);
      for (int64_t c = 0; c < channels; ++c) running[c] += moves * (var[c] - running[c]);
    }
    *(accepted ? iters : rejected).data_ptr<int64_t>() += 1;
  }
  const Tensor slot = at::empty_like(iters);
  const Tensor flags = at::empty({2}, x.options().dtype(at::kBool));
  *slot.data_ptr<int64_t>() = window.slot;
  flags.data_ptr<bool>()[0] = plain;
  flags.data_ptr<bool>()[1] = counts;
  return {y,    x2_, var_, r_, slot, flags.narrow(0, 0, 1), flags.narrow(0, 1, 1), shifted_, r_std_,
          scale_};
}

// The whole backward: dx, or an undefined tensor, dweight and dbias. In contiguous activations a
// channel at a time, as in `normalize`.
std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale_, const OptionalTensor& relu_shift,
    const Tensor& var_, const Tensor& r_std_, Tensor psi_window, const Tensor& slot,
    const Tensor& plain_, bool needs_dx) {
  const Layout layout(x);
  check_like(dy, x);
  const int64_t channels = layout.channels;
  for (const Tensor& vector : {scale_, var_, r_std_}) check_vector(vector, channels);
  if (relu_shift) check_vector(*relu_shift, channels);
  check_flag(slot, at::kLong);
  check_flag(plain_, at::kBool);
  Window window(psi_window, channels, *slot.data_ptr<int64_t>());
  const bool plain = *plain_.data_ptr<bool>();

  const Tensor psi_ = at::empty_like(scale_), factor_ = at::empty_like(scale_);
  Tensor dweight_ = at::empty_like(scale_), dbias_ = at::empty_like(scale_), dx;
  const auto all = [](const Tensor& tensor) { return tensor.data_ptr<float>(); };
  float *psi = all(psi_), *factor = all(factor_), *dweight = all(dweight_), *dbias = all(dbias_);
  const float *scale = all(scale_), *var = all(var_), *r_std = all(r_std_),
              *shift = relu_shift ? all(*relu_shift) : nullptr;
  const float count = float(layout.images * layout.pixels);
  const auto derive = [&](int64_t c, float product) {
    psi[c] = product * scale[c] / count;
    dweight[c] = product * r_std[c];
  };
  const auto choose = [&](int64_t c, bool accepted) {
    factor[c] = -(plain ? psi[c] : window.mean(c, psi[c], accepted)) / var[c];
  };

  if (layout.channels_last) {
    const OptionalTensor gate = relu_shift ? OptionalTensor(scale_) : std::nullopt;
    const auto [products, totals] = product_sums(dy, x, false, gate, relu_shift);
    dbias_ = totals;
    for (int64_t c = 0; c < channels; ++c) derive(c, all(products)[c]);
  } else {
    if (needs_dx) dx = at::empty_like(x);
    dispatch(x, relu_shift.has_value(), [&](auto element, auto gated) {
      using T = decltype(element);
      constexpr bool kRelu = decltype(gated)::value;
      const T *g = data<T>(dy), *in = data<T>(x);
      T* out = needs_dx ? data<T>(dx) : nullptr;
      for_each_channel(layout, [&](int64_t c) {
        const float bound = kRelu ? shift[c] : 0;
        float product;
        channel_sums<T, kRelu>(g, in, layout, c, scale[c], bound, &product, &dbias[c]);
        derive(c, product);
        choose(c, true);
        for (int64_t n = needs_dx ? layout.images : 0; n-- > 0;) {
          const int64_t offset = (n * channels + c) * layout.pixels;
          combine_plane<T, kRelu>(g + offset, in + offset, scale[c], factor[c], 0, bound,
                                  out + offset, layout.pixels);
        }
      });
    });
  }
  const bool accepted = all_finite(psi, channels);
  if (needs_dx && (layout.channels_last || !accepted)) {
    for (int64_t c = 0; c < channels; ++c) choose(c, accepted);
    dx = combine(dy, x, scale_, factor_, std::nullopt, relu_shift);
  }
  if (accepted) window.push(psi);
  return {dx, dweight_, dbias_};
}

}  // namespace

TORCH_LIBRARY(mabn_d2_cpu, library) {
  library.def("affine(Tensor x, Tensor scale, Tensor shift, bool relu=False) -> Tensor");
  library.def("combine(Tensor dy, Tensor x, Tensor dy_scale, Tensor scale, Tensor? shift=None, "
              "Tensor? relu_shift=None) -> Tensor");
  library.def("product_sums(Tensor dy, Tensor x, bool per_image=False, Tensor? relu_scale=None, "
              "Tensor? relu_shift=None) -> (Tensor, Tensor)");
  library.def("normalize(Tensor x, Tensor weight, Tensor bias, Tensor(a!) window, "
              "Tensor(b!) running_var, Tensor(c!) iters, Tensor(d!) rejected, float eps, "
              "float momentum, int warmup_iters, int clip_start, float clip_limit, bool counts, "
              "bool relu) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
              "Tensor, Tensor)");
  library.def("normalize_backward(Tensor dy, Tensor x, Tensor scale, Tensor? relu_shift, Tensor var, "
              "Tensor r_std, Tensor(a!) window, Tensor slot, Tensor plain, bool needs_dx) "
              "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mabn_d2_cpu, CPU, library) {
  library.impl("affine", affine);
  library.impl("combine", combine);
  library.impl("product_sums", product_sums);
  library.impl("normalize", normalize);
  library.impl("normalize_backward", normalize_backward);
}

// Gradients are the caller's business. Without this each call would pass torch's slow default.
TORCH_LIBRARY_IMPL(mabn_d2_cpu, Autograd, library) {
  for (const char* name :
       {"affine", "combine", "product_sums", "normalize", "normalize_backward"}) {
    library.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace mabn
