// The passes as operators on tensors. Their counterparts in torch's own kernels are in torch_passes.py,
// whose docstrings say what each computes.
#pragma once

#include <tuple>

#include "layout.h"

namespace mabn {

// relu?(scale * x + shift) with a row of factors for each group of `size` images, or (C,) for all.
Tensor affine_of_groups(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu,
                        int64_t size);

// dy_scale * g + scale * x + shift, where g is dy or, with relu_shift, dy behind
// relu(dy_scale * x + relu_shift).
Tensor combine_of_groups(const Tensor& dy, const Tensor& x, const Tensor& dy_scale,
                         const Tensor& scale, const OptionalTensor& shift,
                         const OptionalTensor& relu_shift, int64_t size);

// Sums of g * x and of g over pixels, and over images unless per_image: (C,), or (N, C). g is dy or, with
// both of the others, dy behind relu(relu_scale * x + relu_shift).
std::tuple<Tensor, Tensor> product_sums(const Tensor& dy, const Tensor& x, bool per_image,
                                        const OptionalTensor& relu_scale,
                                        const OptionalTensor& relu_shift);

}  // namespace mabn
