// The family "channels": every channel by itself, a label as the target. Sigmoid and none, without a cross-entropy.
#pragma once

#include "passes.h"

namespace {

// Every channel by itself. kPresent: the channel's label occurs in the tile.
template <typename T, Activation kActivation, bool kPresent>
TK_INLINE void count_channel(const Tile<T>& tile, int padded, int c, int classes, int first_label,
                             LogitsVector<T>* counts) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const T* row = tile.rows + c * tile.row_stride;
  const T* next = next_channel(tile, c, classes);
  V tp = counts[kTp], fp = counts[kFp], fn = counts[kFn];
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    prefetch(next + i);
    const I label = load<I>(tile.labels + i);
    const V z = load_logits(row + i);
    Probability<V> p{z, 1 - z};
    if constexpr (kActivation == Activation::kSigmoid) {
      const I negative = z < V{};
      const V e = exp_nonpositive<A>(negative_magnitude<A>(z));
      p = logistic(negative, e, reciprocal<A>(1 + e));
    }
    if (tile.weights != nullptr) {
      const V weight = load<V>(tile.weights + i);
      p.p *= weight;
      p.complement *= weight;
    }
    const I is_target = label == static_cast<typename Lanes<A>::Int>(c + first_label);
    const I is_other = kPresent ? (label >= 0) & ~is_target : label >= 0;
    fp += is_other ? p.p : V{};
    if constexpr (kPresent) {
      tp += is_target ? p.p : V{};
      fn += is_target ? p.complement : V{};
    }
  }
  counts[kTp] = tp;
  counts[kFp] = fp;
  counts[kFn] = fn;
}

template <typename T, Activation kActivation>
void count_channels(const Tile<T>& tile, int padded, int classes, int first_label, PresentClasses& present,
                    CountVectors<T>* counts) {
  const bool few = classes < kFewChannels;
  if (!few) present.set(tile.labels, padded, true);
  for (int c = 0; c < classes; ++c) {
    if (few || present.has(c + first_label)) {
      count_channel<T, kActivation, true>(tile, padded, c, classes, first_label, counts[c]);
    } else {
      count_channel<T, kActivation, false>(tile, padded, c, classes, first_label, counts[c]);
    }
  }
  if (!few) present.set(tile.labels, padded, false);
}

// kPresent: the channel's label occurs in the tile.
template <typename T, Activation kActivation, bool kPresent, bool kMasked, typename U>
TK_INLINE void channel_gradient(const Tile<T>& tile, int padded, int c, int classes, int first_label, const U* u,
                                const GradientRows<T>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const V background = spread<A>(u[c * kOverlapCoefficients + kBackground]);
  const V foreground = spread<A>(u[c * kOverlapCoefficients + kForeground]);
  const T* next = next_channel(tile, c, classes);
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    prefetch(next + i);
    const I label = load<I>(tile.labels + i);
    V dz = background;
    if (kPresent) dz = label == static_cast<typename Lanes<A>::Int>(c + first_label) ? foreground : background;
    if constexpr (kActivation == Activation::kSigmoid) {
      const V z = load_logits(tile.rows + c * tile.row_stride + i);
      const V e = exp_nonpositive<A>(negative_magnitude<A>(z));
      dz = logistic_gradient(e, reciprocal<A>(1 + e), dz);
    }
    if (tile.weights != nullptr) dz *= load<V>(tile.weights + i);
    if (kMasked) dz = label >= 0 ? dz : V{};
    store_logits(out.rows + c * out.row_stride + i, dz, out.streamed);
  }
}

template <typename T, Activation kActivation, bool kMasked, typename U>
void channels_gradient_tile(const Tile<T>& tile, int padded, int classes, int first_label, const U* u,
                            PresentClasses& present, const GradientRows<T>& out) {
  const bool few = classes < kFewChannels;
  if (!few) present.set(tile.labels, padded, true);
  for (int c = 0; c < classes; ++c) {
    if (few || present.has(c + first_label)) {
      channel_gradient<T, kActivation, true, kMasked>(tile, padded, c, classes, first_label, u, out);
    } else {
      channel_gradient<T, kActivation, false, kMasked>(tile, padded, c, classes, first_label, u, out);
    }
  }
  if (!few) present.set(tile.labels, padded, false);
}

template <typename T, Activation kActivation, typename U>
void channels_gradient(const Tile<T>& tile, int padded, int classes, int first_label, const U* u,
                       PresentClasses& present, const GradientRows<T>& out) {
  if (tile.masked) {
    channels_gradient_tile<T, kActivation, true>(tile, padded, classes, first_label, u, present, out);
  } else {
    channels_gradient_tile<T, kActivation, false>(tile, padded, classes, first_label, u, present, out);
  }
}

}  // namespace
