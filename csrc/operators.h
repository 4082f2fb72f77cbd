// What both libraries export: the operators of mlkernels/ops.py that both implement, over what each makes of their
// arguments, its Call; and what they say of themselves. Included once by each.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "schemas.h"

namespace mlkernels {

template <template <class> class Call>
struct Operators {
  static std::tuple<Tensor, Tensor> softmax_loss(const Tensor& input, const Tensor& target, std::vector<double> numbers,
                                                 std::vector<Tensor> params, bool save) {
    return by_type(input, [&](auto zero) {
      using T = decltype(zero);
      Call<T> call(input, target, numbers, params);
      Tensor loss = call.loss_like(target), saved = save ? call.save_rows() : call.empty({0, 2}, type_of<T>());
      call.run();
      return std::make_tuple(std::move(loss), std::move(saved));
    });
  }

  // Loss and gradients in one visit of each row; on a GPU also what "mean" makes of a row's terms.
  static auto softmax_loss_with_gradients(const Tensor& input, const Tensor& target, std::vector<double> numbers,
                                          std::vector<Tensor> params, int64_t needs) {
    return by_type(input, [&](auto zero) {
      Call<decltype(zero)> call(input, target, numbers, params);
      Tensor loss = call.loss_like(target);
      auto factors = call.factors();
      call.p.up_value = 1;
      std::vector<Tensor> gradients = call.run_with_gradients(input, needs);
      return std::tuple_cat(std::make_tuple(std::move(loss), std::move(gradients)), std::move(factors));
    });
  }

  static auto softmax_loss_with_gradient(const Tensor& input, const Tensor& target, std::vector<double> numbers,
                                         std::vector<Tensor> params) {
    return std::apply(
        [](Tensor&& loss, std::vector<Tensor>&& gradients, auto&&... factors) {
          return std::make_tuple(std::move(loss), std::move(gradients[0]), std::move(factors)...);
        },
        softmax_loss_with_gradients(input, target, std::move(numbers), std::move(params), int64_t(1) << INPUT));
  }

  static auto softmax_stats(const Tensor& input, const Tensor& target, std::vector<double> numbers,
                            std::vector<Tensor> params) {
    return by_type(input, [&](auto zero) {
      Call<decltype(zero)> call(input, target, numbers, params);
      const Tensor loss = call.loss_like(target), saved = call.save_rows();
      const auto of = [&](auto*& data) {
        Tensor made = call.empty_of(target, type_of<std::decay_t<decltype(*data)>>());
        data = data_of<std::decay_t<decltype(*data)>>(made);
        return made;
      };
      const Tensor logsumexp = of(call.p.logsumexp), log_prob = of(call.p.log_prob), entropy = of(call.p.entropy);
      const Tensor prediction = of(call.p.prediction), confidence = of(call.p.confidence), rank = of(call.p.rank);
      call.p.want_shift = true;
      call.run();
      return std::make_tuple(loss, saved, logsumexp, log_prob, entropy, prediction, confidence, rank);
    });
  }

  static std::vector<Tensor> softmax_loss_backward(std::optional<Tensor> grad_loss,
                                                   std::optional<Tensor> grad_logsumexp,
                                                   std::optional<Tensor> grad_log_prob,
                                                   std::optional<Tensor> grad_entropy, const Tensor& input,
                                                   const Tensor& target, std::vector<double> numbers,
                                                   std::vector<Tensor> params, Tensor saved, int64_t needs) {
    return by_type(input, [&](auto zero) {
      using T = decltype(zero);
      Call<T> call(input, target, numbers, params);
      auto& p = call.p;
      check_backward(call.arguments, target, grad_loss, {&grad_logsumexp, &grad_log_prob, &grad_entropy}, saved,
                     call.saved_rows(), type_of<T>());
      call.prepare_backward(saved, grad_entropy.has_value());
      p.up_loss = call.per_row(grad_loss);
      p.up_logsumexp = call.per_row(grad_logsumexp);
      p.up_log_prob = call.per_row(grad_log_prob);
      p.up_entropy = call.per_row(grad_entropy);
      if (p.spec.reduction != Reduction::NONE) p.up_loss.stride = 0;
      if (saved.numel() > 0) p.saved = data_of<T>(saved);
      return call.run_with_gradients(input, needs);
    });
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("softmax_loss", TORCH_BOX(&Operators::softmax_loss));
    m.impl("softmax_loss_with_gradient", TORCH_BOX(&Operators::softmax_loss_with_gradient));
    m.impl("softmax_loss_with_gradients", TORCH_BOX(&Operators::softmax_loss_with_gradients));
    m.impl("softmax_stats", TORCH_BOX(&Operators::softmax_stats));
    m.impl("softmax_loss_backward", TORCH_BOX(&Operators::softmax_loss_backward));
  }
};

}  // namespace mlkernels

#define MLK_EXPORT extern "C" __attribute__((visibility("default")))

// Of which numbers: a library that is older than numbering.py would take one loss for another.
MLK_EXPORT const char* mlkernels_numbering() { return mlkernels::NUMBERING; }
// Of which schemas: it would take one argument for another.
MLK_EXPORT const char* mlkernels_schemas() { return mlkernels::SCHEMAS; }
