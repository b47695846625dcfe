// The passes over whole activations on a CPU: every element is read once, vectors stay in cache.
//
// Planes are channels of one image in a contiguous tensor, `pixels` elements each, a factor a plane.
// Pixels are those of a channels-last tensor, `channels` elements each, a factor a channel.
// Arithmetic is in float; loops are plain, for the compiler to vectorize.
#pragma once

#include <cstdint>
#include <cstring>

// One body, compiled for several instruction sets; the loader takes the best that the CPU has.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define MABN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MABN_CLONES
#endif
#define MABN_INLINE inline __attribute__((always_inline))

namespace mabn {

struct BFloat16 {
  uint16_t bits;
};

MABN_INLINE float load(float value) { return value; }

MABN_INLINE float load(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

MABN_INLINE void store(float& out, float value) { out = value; }

MABN_INLINE void store(BFloat16& out, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // NaN stays NaN
}

// NaN passes, as through torch's ReLU.
MABN_INLINE float rectify(float y) { return y < 0 ? 0 : y; }

// dy behind a ReLU of y.
MABN_INLINE float gate(float dy, float y) { return y <= 0 ? 0 : dy; }

// y = relu?(scale * x + shift)

template <typename T, bool relu>
MABN_CLONES void affine_planes(const T* x, const float* scale, const float* shift, T* __restrict y,
                               int64_t planes, int64_t pixels) {
  for (int64_t plane = 0; plane < planes; ++plane, x += pixels, y += pixels) {
    const float a = scale[plane], b = shift[plane];
    for (int64_t i = 0; i < pixels; ++i) {
      const float value = a * load(x[i]) + b;
      store(y[i], relu ? rectify(value) : value);
    }
  }
}

template <typename T, bool relu>
MABN_CLONES void affine_pixels(const T* x, const float* scale, const float* shift, T* __restrict y,
                               int64_t pixels, int64_t channels) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, y += channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const float value = scale[c] * load(x[c]) + shift[c];
      store(y[c], relu ? rectify(value) : value);
    }
  }
}

// dx = dy_scale * g + scale * x + shift, where g is dy, gated by y = dy_scale * x + relu_shift if relu

template <typename T, bool relu>
MABN_CLONES void combine_planes(const T* dy, const T* x, const float* dy_scale, const float* scale,
                                const float* shift, const float* relu_shift, T* __restrict dx,
                                int64_t planes, int64_t pixels) {
  for (int64_t k = 0; k < planes; ++k, dy += pixels, x += pixels, dx += pixels) {
    const float p = dy_scale[k], q = scale[k], a = shift ? shift[k] : 0, b = relu ? relu_shift[k] : 0;
    for (int64_t i = 0; i < pixels; ++i) {
      const float value = load(x[i]);
      const float g = relu ? gate(load(dy[i]), p * value + b) : load(dy[i]);
      store(dx[i], p * g + (q * value + a));
    }
  }
}

template <typename T, bool relu>
MABN_CLONES void combine_pixels(const T* dy, const T* x, const float* dy_scale, const float* scale,
                                const float* shift, const float* relu_shift, T* __restrict dx,
                                int64_t pixels, int64_t channels) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, dy += channels, x += channels, dx += channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const float value = load(x[c]);
      const float g = relu ? gate(load(dy[c]), dy_scale[c] * value + relu_shift[c]) : load(dy[c]);
      store(dx[c], dy_scale[c] * g + (scale[c] * value + shift[c]));
    }
  }
}

// product = sum of g * x, total = sum of g, where g is dy, gated by y = scale * x + shift if relu

constexpr int64_t kLanes = 32;    // independent sums, so that they fill vector registers
constexpr int64_t kBlock = 4096;  // elements that are summed in float; their sums are added in double

// Writes the sums of each plane; if `add`, adds them to what is there.
template <typename T, bool relu>
MABN_CLONES void sums_planes(const T* dy, const T* x, const float* scale, const float* shift,
                             float* __restrict product, float* __restrict total, int64_t planes,
                             int64_t pixels, bool add) {
  for (int64_t plane = 0; plane < planes; ++plane, dy += pixels, x += pixels) {
    const float a = relu ? scale[plane] : 0, b = relu ? shift[plane] : 0;
    double products = add ? product[plane] : 0, totals = add ? total[plane] : 0;
    for (int64_t begin = 0; begin < pixels; begin += kBlock) {
      const int64_t end = begin + kBlock < pixels ? begin + kBlock : pixels;
      float p[kLanes] = {}, t[kLanes] = {};
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) {
          const float value = load(x[i + k]);
          const float g = relu ? gate(load(dy[i + k]), a * value + b) : load(dy[i + k]);
          p[k] += g * value;
          t[k] += g;
        }
      }
      if (i < end) {  // much of a small plane, so it is worth (masked) vectors too
        for (int64_t k = 0; k < kLanes; ++k) {
          const bool inside = i + k < end;
          const float value = inside ? load(x[i + k]) : 0;
          const float y = inside ? load(dy[i + k]) : 0;
          const float g = relu ? gate(y, a * value + b) : y;
          p[k] += g * value;
          t[k] += g;
        }
      }
      for (int64_t width = kLanes / 2; width; width /= 2) {  // by halves, which are vectors
        for (int64_t k = 0; k < width; ++k) {
          p[k] += p[k + width];
          t[k] += t[k + width];
        }
      }
      products += p[0];
      totals += t[0];
    }
    product[plane] = float(products);
    total[plane] = float(totals);
  }
}

constexpr int64_t kAhead = 512;     // elements, the distance of prefetching
constexpr int64_t kCacheLine = 64;  // bytes

template <typename T, bool relu>
MABN_CLONES void sums_pixels(const T* dy, const T* x, const float* scale, const float* shift,
                             float* __restrict product, float* __restrict total, int64_t pixels,
                             int64_t channels) {
  std::memset(product, 0, sizeof(float) * channels);
  std::memset(total, 0, sizeof(float) * channels);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, dy += channels, x += channels) {
    // The hardware does not prefetch this pattern: without this, large inputs take 1.5 times as long.
    for (int64_t c = 0; c < channels; c += kCacheLine / int64_t(sizeof(T))) {
      __builtin_prefetch(dy + c + kAhead);
      __builtin_prefetch(x + c + kAhead);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const float value = load(x[c]);
      const float g = relu ? gate(load(dy[c]), scale[c] * value + shift[c]) : load(dy[c]);
      product[c] += g * value;
      total[c] += g;
    }
  }
}

}  // namespace mabn
