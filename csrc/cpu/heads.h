// The operators of heads that the libraries' other files call too; see mlkernels/ops.py.
#pragma once

#include <tuple>

#include "../call.h"

namespace mlkernels {

std::tuple<Tensor, Tensor> linear_statistics(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> inverse, const Tensor& label, int64_t offset,
                                             const std::vector<double>& numbers, const std::vector<Tensor>& params,
                                             const Tensor& room, bool keep, std::vector<int64_t> plan,
                                             const Tensor& target_logit, const Tensor& scales, int64_t classes,
                                             int64_t want);

void linear_gradient(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> inverse,
                     const Tensor& label, int64_t offset, const std::vector<double>& numbers,
                     const std::vector<Tensor>& params, const Tensor& room, bool kept, std::vector<int64_t> plan,
                     const Tensor& factor, std::optional<Tensor> slope, std::optional<Tensor> spread,
                     const Tensor& target, const Tensor& scale, const Tensor& top, std::optional<Tensor> dx,
                     std::optional<Tensor> dw, std::optional<Tensor> db, bool first, bool last);

// needs: the bits of slots, then those of x, weight and bias.
constexpr int WEIGHT_BIT = INPUT + 1, BIAS_BIT = INPUT + 2;

// Of library_heads.cpp. plan: parts, classes, block; rows of a chunk; whether its products are kept.
std::tuple<Tensor, std::vector<Tensor>> linear_loss_with_gradients(const Tensor& x, const Tensor& weight,
                                                                   std::optional<Tensor> bias,
                                                                   std::optional<Tensor> inverse, const Tensor& target,
                                                                   const Tensor& room, std::vector<int64_t> plan,
                                                                   std::vector<double> numbers,
                                                                   std::vector<Tensor> params, int64_t needs);

Tensor room_like(const Tensor& like, std::vector<int64_t> sizes);

}  // namespace mlkernels
