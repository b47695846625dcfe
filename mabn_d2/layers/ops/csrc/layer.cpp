// MABN as one operator with its gradient, torch.ops.mabn_d2_cpu.mabn, and `mabn_given`, which takes the
// statistics as they are. torch_ops.py documents both.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "ops.h"
#include "vectors.h"

namespace mabn {
namespace {

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

// The last statistics of each channel, (length, channels). A row is an iteration, and `slot` is the row
// that is replaced next. In the split form a row is a group, and the oldest comes first.
struct Window {
  float* data;
  int64_t length, channels, slot;

  Window(const Tensor& tensor, int64_t channels_, int64_t slot_)
      : data(tensor.data_ptr<float>()), length(tensor.size(0)), channels(channels_), slot(slot_) {
    check_vector(tensor, length * channels);
  }

  // The means of channels from begin to end. If `enter`, `values` replace the row `slot`.
  void mean(int64_t begin, int64_t end, const float* values, bool enter, float* out) const {
    mean_of_rows(data, length, channels, values, enter ? slot : -1, begin, end, out);
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
      divide(out, float(length), begin, end);
    }
  }

  // At the first iteration the groups are repeated until the window is full.
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

// The elements of a block of channels, which a core's cache must hold, and the least number of elements
// that is worth reading at a time.
constexpr int64_t kTile = 1 << 15;  // elements
constexpr int64_t kRun = 1 << 10;   // elements

int64_t block_of_channels(const Layout& layout) {
  return std::max<int64_t>(kTile / std::max<int64_t>(layout.images * layout.pixels, 1), 1);
}

// Whether to finish each block of channels, sums and result, before the next one. This does not pay for
// many small images, such as regions of interest: there a block is many short runs far apart.
bool is_by_blocks(const Layout& layout) {
  return !layout.channels_last &&
         (layout.images == 1 || block_of_channels(layout) * layout.pixels >= kRun);
}

// function(begin, end) for blocks of channels.
template <typename F>
void for_each_block(const Layout& layout, const F& function) {
  const int64_t block = block_of_channels(layout);
  at::parallel_for(0, (layout.channels + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      function(k * block, std::min((k + 1) * block, layout.channels));
    }
  });
}

// The sums (G, C) of g * x and of g over the channels from begin to end. With a ReLU, g is dy where the
// ReLU lets it through, else g is dy.
template <typename T, bool relu>
void block_sums(const T* dy, const T* x, const Layout& layout, const Groups& groups, int64_t begin,
                int64_t end, const float* scale, const float* shift, float* products,
                float* totals) {
  for (int64_t n = 0; n < layout.images; ++n) {
    const int64_t k = groups.of(n) * layout.channels + begin;
    const int64_t offset = (n * layout.channels + begin) * layout.pixels;
    sums_planes<T, relu>(dy + offset, x + offset, relu ? scale + k : nullptr,
                         relu ? shift + begin : nullptr, products + k, totals + k, end - begin,
                         layout.pixels, n % groups.size != 0);
  }
}

// The same sums over all channels.
std::tuple<Tensor, Tensor> group_sums(const Tensor& dy, const Tensor& x, const Layout& layout,
                                      const Groups& groups, const OptionalTensor& scale,
                                      const OptionalTensor& shift) {
  if (groups.count == 1) {  // the one row is for all images
    const OptionalTensor factors = scale ? OptionalTensor(scale->flatten()) : std::nullopt;
    return product_sums(dy, x, false, factors, shift);
  }
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

// The state of a layer, which the forward moves, and its settings: see MABN2d.
struct State {
  Tensor window, running_var, iters, rejected;
};

struct Settings {
  double eps, momentum;
  int64_t batch_stats_iters, no_renorm_iters;
  double clip_limit;
};

struct Normalized {
  Tensor y;
  Tensor x2, var, r, slot, use_batch_stats, counted;  // mabn.py's Statistics
  Tensor shifted, r_std, scale;            // var + eps, r / sqrt(var + eps), weight times that
};

// The whole forward. `batch_size` is that of the split form, or 0.
//
// A channel's statistics need no other channel. So if a channel's elements lie together, it is normalized
// right after it was summed, while it is in the cache: one pass over memory instead of two. Only after the
// last channel is it known whether the input is accepted. If not, all channels are normalized again.
Normalized normalize(const Tensor& x, const Tensor& weight, const Tensor& bias, const State& state,
                     const Settings& settings, bool update_state, bool relu,
                     int64_t batch_size) {
  const Tensor &running_var = state.running_var, &iters = state.iters, &rejected = state.rejected;
  const Layout layout(x);
  const Groups groups(layout, batch_size);
  const bool split = batch_size > 0;
  const int64_t channels = layout.channels, size = groups.count * channels,
                length = state.window.size(0);
  for (const Tensor& vector : {weight, bias, running_var}) check_vector(vector, channels);
  check_flag(iters, at::kLong);
  check_flag(rejected, at::kLong);

  const int64_t t = *iters.data_ptr<int64_t>() + 1;
  Window window(state.window, channels, t % length);
  const bool use_batch_stats = t <= settings.batch_stats_iters;
  const bool renorms = t > settings.no_renorm_iters;
  const float eps = float(settings.eps), new_share = float(1 - settings.momentum);
  const float limit = float(settings.clip_limit);

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
    if (use_batch_stats) {
      for (int64_t k = 0; k < size; k += channels) {
        std::copy(x2 + k + begin, x2 + k + end, var + k + begin);
      }
    } else if (split) {
      window.means(begin, end, x2, groups.count, var);
    } else {
      window.mean(begin, end, x2, accepted, var);
    }
    // The running variance starts as the first mean in the split form.
    const bool starts = split && use_batch_stats;
    std::fill(next + begin, next + end, 0);
    for (int64_t k = 0; k < size; k += channels) {
      for (int64_t c = begin; c < end; ++c) next[c] += var[k + c];
    }
    divide(next, float(groups.count), begin, end);
    for (int64_t c = begin; c < end && !starts; ++c) {
      next[c] = running[c] + new_share * (next[c] - running[c]);
    }
    for (int64_t k = 0; k < size; k += channels) {
      choose_r(var + k, starts ? next : running, eps, renorms, limit, r + k, begin, end);
      choose_scales(var + k, r + k, w, eps, shifted + k, r_std + k, scale + k, begin, end);
    }
  };
  const auto average = [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < groups.count; ++g) {
      divide(x2 + g * channels, float(groups.length(g) * layout.pixels), begin, end);
    }
  };

  const bool by_blocks = is_by_blocks(layout);
  Tensor y;
  if (!by_blocks) {
    const Tensor sums =
        std::get<0>(group_sums(x, x, layout, groups, std::nullopt, std::nullopt));
    std::copy(floats(sums), floats(sums) + sums.numel(), x2);
    average(0, channels);
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
        average(begin, end);
        choose(begin, end, true);
        for (int64_t n = layout.images; n-- > 0;) {  // the last image is the warmest
          const int64_t offset = (n * channels + begin) * layout.pixels;
          affine_planes<T, decltype(gated)::value>(
              in + offset, scale + groups.of(n) * channels + begin, b + begin, out + offset,
              end - begin, layout.pixels);
        }
      });
    });
  }
  const bool accepted = all_finite(x2, size);
  if (!by_blocks || !(accepted || split)) {
    choose(0, channels, accepted);
    y = affine_of_groups(x, scale_, bias, relu, groups.size);
  }

  if (update_state) {
    if (accepted) {
      split ? window.push_groups(x2, groups.count, use_batch_stats) : window.push(x2);
      running_var.copy_(next_);
    }
    *(accepted ? iters : rejected).data_ptr<int64_t>() += 1;
  }
  const Tensor slot = at::empty_like(iters);
  const auto flag = [&] { return at::empty({1}, x.options().dtype(at::kBool)); };
  const Tensor use_batch_stats_ = flag(), counted = flag();
  *slot.data_ptr<int64_t>() = window.slot;
  *use_batch_stats_.data_ptr<bool>() = use_batch_stats;
  *counted.data_ptr<bool>() = update_state;
  return {y, x2_, var_, r_, slot, use_batch_stats_, counted, shifted_, r_std_, scale_};
}

// The forward with given statistics, by which activation checkpointing repeats a forward.
Normalized normalize_given(const Tensor& x, const Tensor& weight, const Tensor& bias,
                           const Tensor& var, const Tensor& r, const Tensor& slot,
                           const Tensor& use_batch_stats, double eps, bool relu,
                           int64_t batch_size) {
  const Layout layout(x);
  const Groups groups(layout, batch_size);
  const int64_t channels = layout.channels, size = groups.count * channels;
  for (const Tensor& vector : {var, r}) check_vector(vector, size);
  for (const Tensor& vector : {weight, bias}) check_vector(vector, channels);
  const Tensor shifted = at::empty_like(var), r_std = at::empty_like(var),
               scale = at::empty_like(var);
  for (int64_t k = 0; k < size; k += channels) {
    choose_scales(floats(var) + k, floats(r) + k, floats(weight), float(eps), floats(shifted) + k,
                  floats(r_std) + k, floats(scale) + k, 0, channels);
  }
  const Tensor y = affine_of_groups(x, scale, bias, relu, groups.size);
  return {y, {}, var, r, slot, use_batch_stats, {}, shifted, r_std, scale};
}

// The whole backward: dx (undefined if it is not needed), dweight and dbias. If a channel's elements lie
// together, it takes a block of channels at a time, as `normalize` does.
std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& dy, const Tensor& x, const Tensor& scale_, const OptionalTensor& relu_shift,
    const Tensor& var_, const Tensor& r_std_, const Tensor& psi_window, const Tensor& slot,
    const Tensor& use_batch_stats_, bool needs_dx, int64_t batch_size) {
  const Layout layout(x);
  check_like(dy, x);
  const Groups groups(layout, batch_size);
  const bool split = batch_size > 0;
  const int64_t channels = layout.channels, size = groups.count * channels;
  for (const Tensor& vector : {scale_, var_, r_std_}) check_vector(vector, size);
  if (relu_shift) check_vector(*relu_shift, channels);
  check_flag(slot, at::kLong);
  check_flag(use_batch_stats_, at::kBool);
  Window window(psi_window, channels, *slot.data_ptr<int64_t>());
  const bool use_batch_stats = *use_batch_stats_.data_ptr<bool>();

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
      const int64_t k = g * channels;
      add_gradients(products + k, totals + k, scale + k, r_std + k,
                    float(groups.length(g) * layout.pixels), psi + k, dweight, dbias, begin, end);
    }
    if (use_batch_stats) {
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

  const bool by_blocks = is_by_blocks(layout);
  if (!by_blocks) {
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
          const int64_t k = groups.of(n) * channels + begin;
          const int64_t offset = (n * channels + begin) * layout.pixels;
          combine_planes<T, kRelu>(g + offset, in + offset, scale + k, factor + k, nullptr,
                                   kRelu ? shift + begin : nullptr, out + offset, end - begin,
                                   layout.pixels);
        }
      });
    });
  }
  const bool accepted = all_finite(psi, size);
  const bool again = !(accepted || split);
  if (again) choose(0, channels, false);
  if (needs_dx && (!by_blocks || again)) {
    dx = combine_of_groups(dy, x, scale_, factor_, std::nullopt, relu_shift, groups.size);
  }
  if (accepted) split ? window.push_groups(psi, groups.count, use_batch_stats) : window.push(psi);
  return {dx, dweight_, dbias_};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The loops over vectors need contiguous float32.
Tensor as_vector(const Tensor& vector) { return vector.to(at::kFloat).contiguous(); }

// Called if nothing requires a gradient.
Outputs mabn_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor&,
                     Tensor window, Tensor running_var, Tensor iters, Tensor rejected, double eps,
                     double momentum, int64_t batch_stats_iters, int64_t no_renorm_iters,
                     double clip_limit, bool update_state, bool relu, int64_t batch_size) {
  const Normalized out = normalize(
      x, as_vector(weight), as_vector(bias), {window, running_var, iters, rejected},
      {eps, momentum, batch_stats_iters, no_renorm_iters, clip_limit}, update_state, relu,
      batch_size);
  return {out.y, out.x2, out.var, out.r, out.slot, out.use_batch_stats, out.counted};
}

Tensor mabn_given_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor&,
                          const Tensor& var, const Tensor& r, const Tensor& slot,
                          const Tensor& use_batch_stats, double eps, bool relu,
                          int64_t batch_size) {
  return normalize_given(x, as_vector(weight), as_vector(bias), var, r, slot, use_batch_stats, eps,
                         relu, batch_size).y;
}

Tensor dense_like(const Tensor& dy, const Tensor& x) {
  return dy.contiguous(x.is_contiguous() ? at::MemoryFormat::Contiguous
                                         : at::MemoryFormat::ChannelsLast);
}

// As in second_backward.py.
constexpr char kSecondBackward[] =
    "SplitMABN2d has no second backward through the same forward, which would count its statistics "
    "twice: call backward once, of the sum of the losses";

struct MABN : torch::autograd::Function<MABN> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  // `normalizes` (weight, bias) -> Normalized is the one thing in which `mabn` and `mabn_given` differ.
  template <typename F>
  static Variables forward(Context* context, const Tensor& x, const Tensor& weight,
                           const Tensor& bias, const Tensor& psi_window, const F& normalizes,
                           bool relu, int64_t batch_size) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor shift = as_vector(bias);
    const Normalized out = normalizes(as_vector(weight), shift);
    // Every backend saves these, in this order: see `mabn_given` in torch_ops.py.
    context->save_for_backward({x, out.scale, relu ? shift : Tensor(), out.shifted, out.r_std,
                                out.slot, out.use_batch_stats});
    // The backward writes to it, which the checks of save_for_backward forbid.
    context->saved_data["psi_window"] = psi_window;
    context->saved_data["batch_size"] = batch_size;
    context->set_materialize_grads(false);
    if (!out.x2.defined()) return {out.y};
    const Variables statistics = {out.x2,   out.var,             out.r,
                                  out.slot, out.use_batch_stats, out.counted};
    context->mark_non_differentiable(statistics);
    return {out.y, out.x2, out.var, out.r, out.slot, out.use_batch_stats, out.counted};
  }

  // Gradients get the dtypes of weight and bias from the engine.
  static Variables backward(Context* context, const Variables& gradients) {
    Variables results(7);
    const Tensor& dy = gradients[0];
    if (!dy.defined()) return results;
    if (context->saved_data["batch_size"].toInt() > 0) {
      // Its groups have entered the window; another backward would enter them again.
      TORCH_CHECK(!context->saved_data.count("done"), kSecondBackward);
      context->saved_data["done"] = true;
    }
    // Outside of the guard: to get them, activation checkpointing runs forwards again.
    const Variables saved = context->get_saved_variables();
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const OptionalTensor shift = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
      std::tie(results[0], results[1], results[2]) = normalize_backward(
          dense_like(dy, saved[0]), saved[0], saved[1], shift, saved[3], saved[4],
          context->saved_data["psi_window"].toTensor(), saved[5], saved[6],
          context->needs_input_grad(0), context->saved_data["batch_size"].toInt());
    }
    if (at::GradMode::is_enabled() && dy.requires_grad()) {  // create_graph
      for (Tensor& result : results) {
        if (result.defined()) result.set_requires_grad(true);
      }
      const auto error = std::make_shared<torch::autograd::DelayedError>(
          "MABN2d has no second derivative", int64_t(results.size()));
      return (*error)(std::move(results));
    }
    return results;
  }
};

Outputs mabn(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& psi_window,
             Tensor window, Tensor running_var, Tensor iters, Tensor rejected, double eps,
             double momentum, int64_t batch_stats_iters, int64_t no_renorm_iters,
             double clip_limit, bool update_state, bool relu, int64_t batch_size) {
  const State state{window, running_var, iters, rejected};
  const Settings settings{eps, momentum, batch_stats_iters, no_renorm_iters, clip_limit};
  const auto normalizes = [&](const Tensor& scale, const Tensor& shift) {
    return normalize(x, scale, shift, state, settings, update_state, relu, batch_size);
  };
  const auto out = MABN::apply(x, weight, bias, psi_window, normalizes, relu, batch_size);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

Tensor mabn_given(const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const Tensor& psi_window, const Tensor& var, const Tensor& r, const Tensor& slot,
                  const Tensor& use_batch_stats, double eps, bool relu, int64_t batch_size) {
  const auto normalizes = [&](const Tensor& scale, const Tensor& shift) {
    return normalize_given(x, scale, shift, var, r, slot, use_batch_stats, eps, relu, batch_size);
  };
  return MABN::apply(x, weight, bias, psi_window, normalizes, relu, batch_size)[0];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mabn_d2_cpu, library) {
  // To be raised with each change of an operator's arguments or results: see `_load` in cpu_ops.py.
  library.def("interface_version", []() -> int64_t { return 2; });
  library.def("mabn(Tensor x, Tensor weight, Tensor bias, Tensor(a!) psi_window, Tensor(b!) window, "
              "Tensor(c!) running_var, Tensor(d!) iters, Tensor(e!) rejected, float eps, "
              "float momentum, int batch_stats_iters, int no_renorm_iters, float clip_limit, "
              "bool update_state, bool relu, int batch_size=0) "
              "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("mabn_given(Tensor x, Tensor weight, Tensor bias, Tensor(a!) psi_window, Tensor var, "
              "Tensor r, Tensor slot, Tensor use_batch_stats, float eps, bool relu, "
              "int batch_size=0) -> Tensor");
}

TORCH_LIBRARY_IMPL(mabn_d2_cpu, CPU, library) {
  library.impl("mabn", mabn_forward);
  library.impl("mabn_given", mabn_given_forward);
}

TORCH_LIBRARY_IMPL(mabn_d2_cpu, Autograd, library) {
  library.impl("mabn", mabn);
  library.impl("mabn_given", mabn_given);
}

}  // namespace mabn
