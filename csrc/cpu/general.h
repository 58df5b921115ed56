// What both passes share where every class of a voxel has a target g of its own (takes_general_kernels): the softmax
// with all its terms. Voxels that do not count have logits, targets and weight 0 here, so that what follows needs no
// masks.
#pragma once

#include "tile.h"

namespace {

constexpr int kGeneralVectors = 2;  // vectors of voxels that these kernels work on at once

// All ones where the voxels from `at` on count.
template <typename T>
TK_INLINE IntVector<Compute<T>> general_counted(const Tile<T>& tile, int at) {
  return load<IntVector<Compute<T>>>(tile.labels + at) >= 0;
}

template <typename T>
TK_INLINE Vector<Compute<T>> general_logit(const Tile<T>& tile, int c, int at) {
  using V = Vector<Compute<T>>;
  const V z = load_logits(tile.rows + c * tile.row_stride + at);
  return tile.masked ? (general_counted(tile, at) ? z : V{}) : z;
}

template <typename T>
TK_INLINE Vector<Compute<T>> general_target(const Tile<T>& tile, int c, int at) {
  using A = Compute<T>;
  using V = Vector<A>;
  if (tile.targets == nullptr) return load<IntVector<A>>(tile.labels + at) == tile.first_label + c ? V{} + 1 : V{};
  const V g = load<V>(tile.targets + c * tile.target_stride + at);
  return tile.masked ? (general_counted(tile, at) ? g : V{}) : g;
}

template <typename T>
TK_INLINE Vector<Compute<T>> general_weight(const Tile<T>& tile, int at) {
  using A = Compute<T>;
  using V = Vector<A>;
  const V weight = tile.weights != nullptr ? load<V>(tile.weights + at) : broadcast<A>(1);
  return tile.masked ? (general_counted(tile, at) ? weight : V{}) : weight;
}

// Whether all targets are 0 or 1, so that a binary cross-entropy has one term each. is_one: g == 1.
template <typename A>
TK_INLINE bool is_hard(Vector<A> g, IntVector<A> is_one) {
  return !any(~is_one & (g != 0));
}

template <typename T>
TK_INLINE bool is_weighted(const Tile<T>& tile) {
  return tile.masked || tile.weights != nullptr;
}

// The softmax of kGeneralVectors vectors of voxels. Fills below_top[c] = z_top - z_c and exponentials[c].
template <typename T>
struct GeneralSoftmax {
  using A = Compute<T>;
  using V = Vector<A>;
  V beyond_one[kGeneralVectors], inverse[kGeneralVectors], weight[kGeneralVectors];
  bool weighted;

  TK_INLINE GeneralSoftmax(const Tile<T>& tile, int at, int classes, V* below_top, V* exponentials) {
    constexpr int kLanes = Lanes<A>::count;
    weighted = is_weighted(tile);
    V top[kGeneralVectors];
    for (int c = 0; c < classes; ++c) {
#pragma GCC unroll 2
      for (int k = 0; k < kGeneralVectors; ++k) {
        const V z = general_logit(tile, c, at + k * kLanes);
        prefetch(tile.rows + c * tile.row_stride + at + (kGeneralVectors + k) * kLanes);
        top[k] = c == 0 ? z : maximum(top[k], z);
        below_top[c * kGeneralVectors + k] = z;
      }
    }
    TopSums<V> sums[kGeneralVectors];
    for (int c = 0; c < classes; ++c) {
#pragma GCC unroll 2
      for (int k = 0; k < kGeneralVectors; ++k) {
        const V below = top[k] - below_top[c * kGeneralVectors + k];
        const V e = exp_nonpositive<A>(-below);
        sums[k].add(below == 0, e);
        below_top[c * kGeneralVectors + k] = below;
        exponentials[c * kGeneralVectors + k] = e;
      }
    }
    for (int k = 0; k < kGeneralVectors; ++k) {
      beyond_one[k] = sums[k].beyond_one();
      inverse[k] = reciprocal<A>(1 + beyond_one[k]);
      weight[k] = general_weight(tile, at + k * kLanes);
    }
  }

  TK_INLINE Probability<V> probability(int k, V below_top, V exponential) const {
    const V p = exponential * inverse[k];
    return {p, below_top == 0 ? beyond_one[k] * inverse[k] : 1 - p};
  }
};

// Calls f with the activation, the form of the overlap and whether there is a cross-entropy, as constants.
template <typename F>
TK_INLINE void with_general_options(const Volume& v, F&& f) {
  const auto with_form = [&](auto activation, auto cross_entropy) __attribute__((always_inline)) {
    switch (v.overlap) {
      case OverlapForm::kProduct:
        return f(activation, std::integral_constant<OverlapForm, OverlapForm::kProduct>{}, cross_entropy);
      case OverlapForm::kAbsolute:
        return f(activation, std::integral_constant<OverlapForm, OverlapForm::kAbsolute>{}, cross_entropy);
      case OverlapForm::kSquared:
        return f(activation, std::integral_constant<OverlapForm, OverlapForm::kSquared>{}, cross_entropy);
    }
  };
  const auto with_activation = [&](auto activation) __attribute__((always_inline)) {
    constexpr bool kHasCrossEntropy = decltype(activation)::value != Activation::kNone;
    if constexpr (kHasCrossEntropy) {
      if (v.cross_entropy != CrossEntropy::kNone) return with_form(activation, std::true_type{});
    }
    return with_form(activation, std::false_type{});
  };
  switch (v.activation) {
    case Activation::kSoftmax: return with_activation(std::integral_constant<Activation, Activation::kSoftmax>{});
    case Activation::kSigmoid: return with_activation(std::integral_constant<Activation, Activation::kSigmoid>{});
    case Activation::kNone: return with_activation(std::integral_constant<Activation, Activation::kNone>{});
  }
}

}  // namespace
