// The operators of library_pieces.cpp that library_heads.cpp calls too; see mlkernels/ops.py.
#pragma once

#include <tuple>

#include "../call.h"

namespace mlkernels {

std::tuple<Tensor, Tensor> linear_statistics(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> inverse, const Tensor& label, int64_t offset,
                                             std::optional<Tensor> class_weight, std::optional<Tensor> adjustment,
                                             double softcap, const Tensor& room, bool keep, std::vector<int64_t> plan,
                                             const Tensor& target_logit, const Tensor& scales, int64_t classes,
                                             int64_t want);

void linear_gradient(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> inverse,
                     const Tensor& label, int64_t offset, std::optional<Tensor> class_weight,
                     std::optional<Tensor> adjustment, double softcap, const Tensor& room, bool kept,
                     std::vector<int64_t> plan, const Tensor& factor, std::optional<Tensor> slope,
                     std::optional<Tensor> spread, const Tensor& target, const Tensor& scale, const Tensor& top,
                     std::optional<Tensor> dx, std::optional<Tensor> dw, std::optional<Tensor> db, bool first,
                     bool last);

Tensor room_like(const Tensor& like, std::vector<int64_t> sizes);

}  // namespace mlkernels
