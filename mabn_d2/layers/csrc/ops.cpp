// MABN's operators on a CPU: torch.ops.mabn_d2_cpu. Their callers, where torch's own kernels do the
// same elsewhere, are kernels.py and functional.py, whose docstrings say what each computes.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
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

// Consecutive images that share their statistics, so a row of (G, C) vectors. `batch_size` 0: all do.
struct Groups {
  int64_t images, size, count;

  Groups(const Layout& layout, int64_t batch_size)
      : images(layout.images), size(batch_size ? batch_size : std::max<int64_t>(images, 1)),
        count((images + size - 1) / size) {}

  int64_t of(int64_t image) const { return image / size; }
  int64_t length(int64_t group) const { return std::min(size, images - group * size); }
};

// Per-channel factors: (C,), or (G, C) with a row for each group of `size` images.
struct Factors {
  const float* data = nullptr;
  int64_t stride = 0, size = 1;

  Factors(const OptionalTensor& vector, const Layout& layout, int64_t size_ = 1) : size(size_) {
    if (!vector) return;
    const bool rows = vector->dim() == 2;
    TORCH_CHECK(vector->device().is_cpu() && vector->scalar_type() == at::kFloat &&
                    vector->is_contiguous() && vector->numel() ==
                        layout.channels * (rows ? Groups(layout, size).count : 1),
                "expected a contiguous float32 vector (C,), or (N, C)");
    data = vector->data_ptr<float>();
    stride = rows ? layout.channels : 0;
  }

  const float* row(int64_t image) const { return data ? data + image / size * stride : nullptr; }
  float at(int64_t image, int64_t channel) const { return data ? row(image)[channel] : 0; }
};

template <typename T>
T* data(const Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data_ptr());
}

float* floats(const Tensor& tensor) { return tensor.data_ptr<float>(); }

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

Tensor affine_of_groups(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu,
                        int64_t size) {
  const Layout layout(x);
  const Factors scales(scale, layout, size), shifts(shift, layout, size);
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

Tensor affine(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu) {
  return affine_of_groups(x, scale, shift, relu, 1);
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

Tensor combine(const Tensor& dy, const Tensor& x, const Tensor& dy_scale, const Tensor& scale,
               const OptionalTensor& shift, const OptionalTensor& relu_shift) {
  return combine_of_groups(dy, x, dy_scale, scale, shift, relu_shift, 1);
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

// The last statistics of each channel, (length, channels): by iterations, of which `slot` is
// replaced next, or in the split form by groups, the oldest first.
struct Window {
  float* data;
  int64_t length, channels, slot;

  Window(const Tensor& tensor, int64_t channels_, int64_t slot_)
      : data(tensor.data_ptr<float>()), length(tensor.size(0)), channels(channels_), slot(slot_) {
    check_vector(tensor, length * channels);
  }

  // Means of channels from begin to end, with `values` in the slot if they are to enter.
  void mean(int64_t begin, int64_t end, const float* values, bool enter, float* out) const {
    std::fill(out + begin, out + end, 0);
    for (int64_t k = 0; k < length; ++k) {
      const float* row = k == slot && enter ? values : data + k * channels;
      for (int64_t c = begin; c < end; ++c) out[c] += row[c];
    }
    for (int64_t c = begin; c < end; ++c) out[c] /= float(length);
  }

  void push(const float* values) { std::copy(values, values + channels, data + slot * channels); }

  // The means over the `length` groups that end with each of `rows` (groups, channels).
  void means(int64_t begin, int64_t end, const float* rows, int64_t groups, float* out) const {
    for (int64_t g = 0; g < groups; ++g, out += channels) {
      std::fill(out + begin, out + end, 0);
      for (int64_t k = g + 1; k <= g + length; ++k) {
        const float* row = k < length ? data + k * channels : rows + (k - length) * channels;
        for (int64_t c = begin; c < end; ++c) out[c] += row[c];
      }
      for (int64_t c = begin; c < end; ++c) out[c] /= float(length);
    }
  }

  // If nothing has entered yet, fewer groups than `length` are repeated.
  void push_groups(const float* rows, int64_t groups, bool first) {
    const auto size = [&](int64_t number) { return number * channels; };
    const int64_t kept = first ? 0 : std::max<int64_t>(length - groups, 0);
    std::copy(data + size(length - kept), data + size(length), data);
    for (int64_t k = kept; k < length; ++k) {
      const float* row = rows + size((k - length % groups + groups) % groups);
      std::copy(row, row + channels, data + size(k));
    }
  }
};

// function(begin, end) for blocks of channels of contiguous activations, which a core's cache holds.
constexpr int64_t kTile = 1 << 15;  // elements

template <typename F>
void for_each_block(const Layout& layout, const F& function) {
  const int64_t size = std::max<int64_t>(layout.images * layout.pixels, 1);
  const int64_t block = std::max<int64_t>(kTile / size, 1);
  at::parallel_for(0, (layout.channels + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      function(k * block, std::min((k + 1) * block, layout.channels));
    }
  });
}

// Sums (G, C) of g * x and g, where g is dy behind the ReLU, if there is one: of some channels.
template <typename T, bool relu>
void block_sums(const T* dy, const T* x, const Layout& layout, const Groups& groups, int64_t begin,
                int64_t end, const float* scale, const float* shift, float* products,
                float* totals) {
  for (int64_t n = 0; n < layout.images; ++n) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t k = groups.of(n) * layout.channels + c;
      const int64_t offset = (n * layout.channels + c) * layout.pixels;
      float product, total;
      sums_plane<T, relu>(dy + offset, x + offset, relu ? scale[k] : 0, relu ? shift[c] : 0,
                          &product, &total, layout.pixels);
      products[k] = product + (n % groups.size ? products[k] : 0);
      totals[k] = total + (n % groups.size ? totals[k] : 0);
    }
  }
}

// The same of all channels of channels-last activations.
std::tuple<Tensor, Tensor> group_sums(const Tensor& dy, const Tensor& x, const Layout& layout,
                                      const Groups& groups, const OptionalTensor& scale,
                                      const OptionalTensor& shift) {
  if (groups.count == 1) return product_sums(dy, x, false, scale, shift);
  OptionalTensor scales = scale;
  if (scale && groups.size > 1) {  // a row for each image
    scales = scale->repeat_interleave(groups.size, 0).narrow(0, 0, layout.images).contiguous();
  }
  auto sums = product_sums(dy, x, true, scales, shift);
  for (Tensor* rows : {&std::get<0>(sums), &std::get<1>(sums)}) {
    const Tensor out = at::zeros({groups.count, layout.channels}, rows->options());
    for (int64_t n = 0; n < layout.images; ++n) {
      const float* in = floats(*rows) + n * layout.channels;
      float* sum = floats(out) + groups.of(n) * layout.channels;
      for (int64_t c = 0; c < layout.channels; ++c) sum[c] += in[c];
    }
    *rows = out;
  }
  return sums;
}

// The whole forward: y, what it was normalized by (mabn.py's Statistics), and var + eps,
// r / sqrt(var + eps) and weight times that. `batch_size` is that of the split form, or 0.
//
// A channel's statistics need no other channel. So in contiguous activations each channel is mapped
// right after it was summed, while it is in the cache: one pass over memory in place of two. Whether
// the input is accepted is known after the last channel; if it is not, all are mapped once more.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize(
    const Tensor& x, const Tensor& weight, const Tensor& bias, Tensor window_, Tensor running_var,
    Tensor iters, Tensor rejected, double eps_, double momentum, int64_t warmup_iters,
    int64_t clip_start, double clip_limit, bool counts, bool relu, int64_t batch_size) {
  const Layout layout(x);
  const Groups groups(layout, batch_size);
  const bool split = batch_size > 0;
  const int64_t channels = layout.channels, length = window_.size(0);
  for (const Tensor& vector : {weight, bias, running_var}) check_vector(vector, channels);
  check_flag(iters, at::kLong);
  check_flag(rejected, at::kLong);

  const int64_t t = *iters.data_ptr<int64_t>() + 1;
  Window window(window_, channels, t % length);
  const bool plain = split ? t == 1 : t <= std::max(length, warmup_iters - 1);
  const bool clips = split ? t >= warmup_iters : t > std::max(clip_start, warmup_iters);
  const float eps = float(eps_), low = float(1 / clip_limit), high = float(clip_limit);
  const float moves = float(1 - momentum);

  const auto vectors = [&] {
    return split ? at::empty({groups.count, channels}, weight.options())
                 : at::empty({channels}, weight.options());
  };
  const Tensor x2_ = vectors(), var_ = vectors(), r_ = vectors(), shifted_ = vectors(),
               r_std_ = vectors(), scale_ = vectors(), next_ = at::empty_like(running_var);
  float *x2 = floats(x2_), *var = floats(var_), *r = floats(r_), *shifted = floats(shifted_),
        *r_std = floats(r_std_), *scale = floats(scale_), *next = floats(next_);
  const float *w = floats(weight), *b = floats(bias), *running = floats(running_var);

  // For channels from begin to end.
  const auto choose = [&](int64_t begin, int64_t end, bool accepted) {
    if (plain) {
      for (int64_t k = 0; k < groups.count * channels; k += channels) {
        std::copy(x2 + k + begin, x2 + k + end, var + k + begin);
      }
    } else if (split) {
      window.means(begin, end, x2, groups.count, var);
    } else {
      window.mean(begin, end, x2, accepted, var);
    }
    for (int64_t c = begin; c < end; ++c) {
      float mean = 0;
      for (int64_t g = 0; g < groups.count; ++g) mean += var[g * channels + c];
      mean /= float(groups.count);
      const float before = split && plain ? mean : running[c];
      next[c] = before + moves * (mean - before);
      for (int64_t k = c; k < groups.count * channels; k += channels) {
        shifted[k] = var[k] + eps;
        const float ratio = clips ? std::sqrt(shifted[k] / (before + eps)) : 1;
        r[k] = ratio < low ? low : ratio > high ? high : ratio;  // NaN passes, as in torch's clamp
        r_std[k] = r[k] / std::sqrt(shifted[k]);
        scale[k] = r_std[k] * w[c];
      }
    }
  };
  const auto divide = [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < groups.count; ++g) {
      const float count = float(groups.length(g) * layout.pixels);
      for (int64_t c = begin; c < end; ++c) x2[g * channels + c] /= count;
    }
  };

  Tensor y;
  if (layout.channels_last) {
    const Tensor sums =
        std::get<0>(group_sums(x, x, layout, groups, std::nullopt, std::nullopt));
    std::copy(floats(sums), floats(sums) + sums.numel(), x2);
    divide(0, channels);
  } else {
    y = at::empty_like(x);
    const Tensor totals = vectors();
    dispatch(x, relu, [&](auto element, auto gated) {
      using T = decltype(element);
      const T* in = data<T>(x);
      T* out = data<T>(y);
      for_each_block(layout, [&](int64_t begin, int64_t end) {
        block_sums<T, false>(in, in, layout, groups, begin, end, nullptr, nullptr, x2,
                             floats(totals));
        divide(begin, end);
        choose(begin, end, true);
        for (int64_t n = layout.images; n-- > 0;) {  // the last image is the warmest
          for (int64_t c = begin; c < end; ++c) {
            const int64_t offset = (n * channels + c) * layout.pixels;
            affine_plane<T, decltype(gated)::value>(in + offset, scale[groups.of(n) * channels + c],
                                                    b[c], out + offset, layout.pixels);
          }
        }
      });
    });
  }
  const bool accepted = all_finite(x2, groups.count * channels);
  if (layout.channels_last || !(accepted || split)) {
    choose(0, channels, accepted);
    y = affine_of_groups(x, scale_, bias, relu, groups.size);
  }

  if (counts) {
    if (accepted) {
      split ? window.push_groups(x2, groups.count, plain) : window.push(x2);
      running_var.copy_(next_);
    }
    *(accepted ? iters : rejected).data_ptr<int64_t>() += 1;
  }
  const Tensor slot = at::empty_like(iters);
  const auto flag = [&] { return at::empty({1}, x.options().dtype(at::kBool)); };
  const Tensor plain_ = flag(), counts_ = flag();
  *slot.data_ptr<int64_t>() = window.slot;
  *plain_.data_ptr<bool>() = plain;
  *counts_.data_ptr<bool>() = counts;
  return {y, x2_, var_, r_, slot, plain_, counts_, shifted_, r_std_, scale_};
}

// The whole backward: dx, or an undefined tensor, dweight and dbias. In contiguous activations a
// block of channels at a time, as in `normalize`.
std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale_, const OptionalTensor& relu_shift,
    const Tensor& var_, const Tensor& r_std_, Tensor psi_window, const Tensor& slot,
    const Tensor& plain_, bool needs_dx, int64_t batch_size) {
  const Layout layout(x);
  check_like(dy, x);
  const Groups groups(layout, batch_size);
  const bool split = batch_size > 0;
  const int64_t channels = layout.channels, size = groups.count * channels;
  for (const Tensor& vector : {scale_, var_, r_std_}) check_vector(vector, size);
  if (relu_shift) check_vector(*relu_shift, channels);
  check_flag(slot, at::kLong);
  check_flag(plain_, at::kBool);
  Window window(psi_window, channels, *slot.data_ptr<int64_t>());
  const bool plain = *plain_.data_ptr<bool>();

  Tensor products_ = at::empty_like(scale_), totals_ = at::empty_like(scale_), dx;
  const Tensor psi_ = at::empty_like(scale_), factor_ = at::empty_like(scale_),
               dweight_ = at::empty({channels}, scale_.options()),
               dbias_ = at::empty_like(dweight_);
  float *psi = floats(psi_), *factor = floats(factor_), *dweight = floats(dweight_),
        *dbias = floats(dbias_), *products = floats(products_), *totals = floats(totals_);
  const float *scale = floats(scale_), *var = floats(var_), *r_std = floats(r_std_),
              *shift = relu_shift ? floats(*relu_shift) : nullptr;
  // For channels from begin to end.
  const auto choose = [&](int64_t begin, int64_t end, bool accepted) {
    std::fill(dweight + begin, dweight + end, 0);
    std::fill(dbias + begin, dbias + end, 0);
    for (int64_t g = 0; g < groups.count; ++g) {
      const float count = float(groups.length(g) * layout.pixels);
      for (int64_t c = begin, k = g * channels + begin; c < end; ++c, ++k) {
        psi[k] = products[k] * scale[k] / count;
        dweight[c] += products[k] * r_std[k];
        dbias[c] += totals[k];
      }
    }
    if (plain) {
      for (int64_t k = 0; k < size; k += channels) {
        std::copy(psi + k + begin, psi + k + end, factor + k + begin);
      }
    } else if (split) {
      window.means(begin, end, psi, groups.count, factor);
    } else {
      window.mean(begin, end, psi, accepted, factor);
    }
    for (int64_t k = 0; k < size; k += channels) {
      for (int64_t c = k + begin; c < k + end; ++c) factor[c] /= -var[c];
    }
  };

  if (layout.channels_last) {
    const OptionalTensor gate = relu_shift ? OptionalTensor(scale_) : std::nullopt;
    std::tie(products_, totals_) = group_sums(dy, x, layout, groups, gate, relu_shift);
    products = floats(products_), totals = floats(totals_);
    choose(0, channels, true);
  } else {
    if (needs_dx) dx = at::empty_like(x);
    dispatch(x, relu_shift.has_value(), [&](auto element, auto gated) {
      using T = decltype(element);
      constexpr bool kRelu = decltype(gated)::value;
      const T *g = data<T>(dy), *in = data<T>(x);
      T* out = needs_dx ? data<T>(dx) : nullptr;
      for_each_block(layout, [&](int64_t begin, int64_t end) {
        block_sums<T, kRelu>(g, in, layout, groups, begin, end, scale, shift, products, totals);
        choose(begin, end, true);
        for (int64_t n = needs_dx ? layout.images : 0; n-- > 0;) {
          for (int64_t c = begin; c < end; ++c) {
            const int64_t k = groups.of(n) * channels + c;
            const int64_t offset = (n * channels + c) * layout.pixels;
            combine_plane<T, kRelu>(g + offset, in + offset, scale[k], factor[k], 0,
                                    kRelu ? shift[c] : 0, out + offset, layout.pixels);
          }
        }
      });
    });
  }
  const bool accepted = all_finite(psi, size);
  const bool again = !(accepted || split);
  if (again) choose(0, channels, false);
  if (needs_dx && (layout.channels_last || again)) {
    dx = combine_of_groups(dy, x, scale_, factor_, std::nullopt, relu_shift, groups.size);
  }
  if (accepted) split ? window.push_groups(psi, groups.count, plain) : window.push(psi);
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
              "bool relu, int batch_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
              "Tensor, Tensor, Tensor, Tensor)");
  library.def("normalize_backward(Tensor dy, Tensor x, Tensor scale, Tensor? relu_shift, Tensor var, "
              "Tensor r_std, Tensor(a!) window, Tensor slot, Tensor plain, bool needs_dx, "
              "int batch_size) -> (Tensor, Tensor, Tensor)");
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
