// Arithmetic on per-channel vectors, on the channels from begin to end.
#pragma once

#include <cmath>
#include <cstdint>

#include "passes.h"

namespace mabn {

MABN_CLONES inline void divide(float* __restrict vector, float count, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) vector[c] /= count;
}

// out = mean of the `length` rows of data (length, channels), with `values` in place of row `slot`.
MABN_CLONES inline void mean_of_rows(const float* data, int64_t length, int64_t channels,
                                     const float* values, int64_t slot, int64_t begin, int64_t end,
                                     float* __restrict out) {
  for (int64_t c = begin; c < end; ++c) out[c] = 0;
  for (int64_t k = 0; k < length; ++k) {
    const float* row = k == slot ? values : data + k * channels;
    for (int64_t c = begin; c < end; ++c) out[c] += row[c];
  }
  divide(out, float(length), begin, end);
}

// r: `renorm` in functional.py, or 1.
MABN_CLONES inline void choose_r(const float* var, const float* running, float eps, bool renorms,
                                 float limit, float* __restrict r, int64_t begin, int64_t end) {
  const float low = 1 / limit;
  for (int64_t c = begin; c < end; ++c) r[c] = 1;
  for (int64_t c = begin; renorms && c < end; ++c) {
    const float ratio = std::sqrt((var[c] + eps) / (running[c] + eps));
    r[c] = ratio < low ? low : ratio > limit ? limit : ratio;  // NaN passes, as in torch's clamp
  }
}

// `scales` in functional.py: var + eps, r / sqrt(var + eps), and weight times that.
MABN_CLONES inline void choose_scales(const float* var, const float* r, const float* weight, float eps,
                                      float* __restrict shifted, float* __restrict r_std,
                                      float* __restrict scale, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    shifted[c] = var[c] + eps;
    r_std[c] = r[c] / std::sqrt(shifted[c]);
    scale[c] = r_std[c] * weight[c];
  }
}

// psi of a group, and what the group adds to the gradients.
MABN_CLONES inline void add_gradients(const float* products, const float* totals, const float* scale,
                                      const float* r_std, float count, float* __restrict psi,
                                      float* __restrict dweight, float* __restrict dbias,
                                      int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    psi[c] = products[c] * scale[c] / count;
    dweight[c] += products[c] * r_std[c];
    dbias[c] += totals[c];
  }
}

}  // namespace mabn
