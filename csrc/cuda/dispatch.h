// Values that are known at the launch of a kernel, as constants. Each function calls f with one.
#pragma once

#include <type_traits>

#include "../common/views.h"
#include "platform.h"

namespace tversky_kernels {
namespace cuda {

// Calls f with a value of the logits' type.
template <typename F>
void with_logits_type(ElementType type, F&& f) {
  switch (type) {
    case ElementType::kDouble: return f(double{});
    case ElementType::kHalf: return f(Half{});
    case ElementType::kBFloat16: return f(BFloat16{});
    default: return f(float{});
  }
}

// Calls f with a bool as a constant.
template <typename F>
void with_bool(bool value, F&& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

// Calls f(ce, squared), constants of type CrossEntropy and bool, for a plan whose target is a label.
template <typename F>
void with_label_sums(const Volume& v, F&& f) {
  if (v.cross_entropy == CrossEntropy::kSmoothed) {
    return f(std::integral_constant<CrossEntropy, CrossEntropy::kSmoothed>{}, std::false_type{});
  }
  with_bool(v.overlap == OverlapForm::kSquared, [&](auto squared) {
    if (v.cross_entropy == CrossEntropy::kPlain) {
      f(std::integral_constant<CrossEntropy, CrossEntropy::kPlain>{}, squared);
    } else {
      f(std::integral_constant<CrossEntropy, CrossEntropy::kNone>{}, squared);
    }
  });
}

// Calls f with the activation as a constant.
template <typename F>
void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kSoftmax: return f(std::integral_constant<Activation, Activation::kSoftmax>{});
    case Activation::kSigmoid: return f(std::integral_constant<Activation, Activation::kSigmoid>{});
    case Activation::kNone: return f(std::integral_constant<Activation, Activation::kNone>{});
  }
}

// Calls f(type, activation).
template <typename F>
void with_type_and_activation(const Volume& v, F&& f) {
  with_logits_type(v.logits.type, [&](auto element) {
    with_activation(v.activation, [&](auto activation) { f(element, activation); });
  });
}

}  // namespace cuda
}  // namespace tversky_kernels
