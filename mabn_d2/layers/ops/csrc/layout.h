// How activations and per-channel vectors are laid out in memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "passes.h"

namespace mabn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 15;   // elements that are worth a thread
constexpr int64_t kPixels = 256;      // pixels in a piece, in channels-last
constexpr int64_t kPlanes = 1 << 13;  // elements in a piece of several planes

// A dense activation, cut into pieces of neighbouring rows of one image: channels-last pixels, or the
// planes of channels. The number of pieces, and so the rounding of sums, does not depend on the
// number of threads.
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
    rows = channels_last ? kPixels : std::max<int64_t>(kPlanes / std::max<int64_t>(pixels, 1), 1);
    per_image = (all_rows() + rows - 1) / rows;
  }

  int64_t all_rows() const { return channels_last ? pixels : channels; }

  // In channels-last, a piece may span images if all images have the same factors.
  void join_images() {
    pixels *= images;
    images = 1;
    cut();
  }

  // Calls function(image, first, count, offset) for each piece: `count` rows of an image, and where the
  // first one begins. A second pass runs backwards, so that each thread begins with what its cache holds.
  template <typename F>
  void for_each_piece(const F& function, bool backwards = false) const {
    const int64_t width = channels_last ? channels : pixels;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(rows * width, 1));
    at::parallel_for(0, images * per_image, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = backwards ? begin + end - 1 - i : i;
        const int64_t image = k / per_image, first = k % per_image * rows;
        function(image, first, std::min(rows, all_rows() - first),
                 (image * all_rows() + first) * width);
      }
    });
  }
};

// Strides are not compared: the stride of a dimension of size 1 has no meaning.
inline void check_like(const Tensor& tensor, const Tensor& x) {
  const auto format =
      x.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(tensor.sizes() == x.sizes() && tensor.is_contiguous(format) &&
                  tensor.scalar_type() == x.scalar_type() && tensor.device() == x.device(),
              "expected two tensors of the same shape, memory format, dtype and device");
}

// Groups of consecutive images that share a row of the (G, C) vectors. If `batch_size` is 0, all do.
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

  const float* of(int64_t image, int64_t channel = 0) const {
    return data ? data + image / size * stride + channel : nullptr;
  }
};

template <typename T>
T* data(const Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data_ptr());
}

inline float* floats(const Tensor& tensor) { return tensor.data_ptr<float>(); }

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

}  // namespace mabn
