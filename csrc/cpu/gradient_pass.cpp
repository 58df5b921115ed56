// The gradient pass on the CPU: logits, target and coefficients in, dL/dlogits out. Compiled once per instruction set.
#include "tile.h"

namespace {

// Where a tile's gradient goes: rows of the gradient itself, or a buffer that is copied there afterwards.
template <typename T>
struct GradientRows {
  T* rows;
  int64_t row_stride;
};

enum Coefficient { kBackground, kForeground, kCoefficients };

template <typename T, bool kMasked>
TK_INLINE void two_classes_gradient(const Tile<T>& tile, int padded, const Compute<T>* u, const GradientRows<T>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  const A difference0 = u[kCoefficients + kBackground] - u[kForeground];  // u_1 - u_0 where the label is 0
  const A difference1 = u[kCoefficients + kForeground] - u[kBackground];  // where it is 1
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    const I label = load<I>(tile.labels + i);
    const V d = two_class_logit(load_logits(tile.rows + i), load_logits(tile.rows + tile.row_stride + i));
    const V e = exp_nonpositive<A>(d < V{} ? d : -d);
    const V inverse = 1 / (1 + e);
    V dz1 = logistic_gradient(e, inverse, label == 1 ? broadcast<A>(difference1) : broadcast<A>(difference0));
    if (tile.weights != nullptr) dz1 *= load<V>(tile.weights + i);
    if (kMasked) dz1 = label >= 0 ? dz1 : V{};
    store_logits(out.rows + i, -dz1);
    store_logits(out.rows + out.row_stride + i, dz1);
  }
}

template <typename T, int kClasses, int kVectors, bool kMasked>
TK_INLINE void softmax_gradient_block(const Tile<T>& tile, int at, int runtime_classes, const Compute<T>* u,
                                      PresentClasses& present, Vector<Compute<T>>* exponentials,
                                      const GradientRows<T>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  using Int = typename Lanes<A>::Int;
  constexpr int kLanes = Lanes<A>::count;
  constexpr bool kFew = kClasses > 0;
  const int classes = kFew ? kClasses : runtime_classes;
  const T* rows = tile.rows + at;

  V top[kVectors];
  I label[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    top[k] = load_logits(rows + k * kLanes);
    label[k] = load<I>(tile.labels + at + k * kLanes);
  }
#pragma GCC unroll 8
  for (int c = 1; c < classes; ++c) {
    const T* row = rows + c * tile.row_stride;
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      top[k] = maximum(top[k], load_logits(row + k * kLanes));
      if (!kFew) prefetch(row + (kVectors + k) * kLanes);
    }
  }
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, true);

  SoftmaxSums<V> sums[kVectors];
  V weighted_others[kVectors] = {}, u_target[kVectors] = {};
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    const T* row = rows + c * tile.row_stride;
    const V background = broadcast<A>(u[c * kCoefficients + kBackground]);
    const V foreground = broadcast<A>(u[c * kCoefficients + kForeground]);
    const bool is_present = kFew || present.has(c);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const V e = exp_nonpositive<A>(load_logits(row + k * kLanes) - top[k]);
      V other;
      if (is_present) {
        const I is_target = label[k] == static_cast<Int>(c);
        const I is_other = kMasked ? (label[k] != static_cast<Int>(c)) & (label[k] >= 0) : ~is_target;
        other = sums[k].add(is_target, is_other, e);
        u_target[k] = is_target ? foreground : u_target[k];
      } else {
        other = sums[k].add_other(kMasked ? (label[k] >= 0 ? e : V{}) : e);
      }
      weighted_others[k] += other * background;
      exponentials[c * kVectors + k] = other;
    }
  }

  SoftmaxGradient<V> gradient[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    V inverse = 1 / (sums[k].target + sums[k].others);
    if (kMasked) inverse = label[k] >= 0 ? inverse : V{};
    const V weight = tile.weights != nullptr ? load<V>(tile.weights + at + k * kLanes) : broadcast<A>(1);
    gradient[k] = softmax_gradient(sums[k], weighted_others[k], u_target[k], inverse, weight);
  }
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    T* row = out.rows + at + c * out.row_stride;
    const V background = broadcast<A>(u[c * kCoefficients + kBackground]);
    const bool is_present = kFew || present.has(c);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      V dz = gradient[k].other(exponentials[c * kVectors + k], background);
      if (is_present) dz = label[k] == static_cast<Int>(c) ? gradient[k].at_target : dz;
      store_logits(row + k * kLanes, dz);
    }
  }
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, false);
}

template <typename T, int kClasses, bool kMasked>
TK_INLINE void softmax_gradient_rows(const Tile<T>& tile, int padded, int classes, const Compute<T>* u,
                                     PresentClasses& present, Vector<Compute<T>>* exponentials,
                                     const GradientRows<T>& out) {
  if constexpr (kClasses == 2) {
    two_classes_gradient<T, kMasked>(tile, padded, u, out);
  } else if constexpr (kClasses > 0) {
    Vector<Compute<T>> registers[kClasses];
    for (int at = 0; at < padded; at += Lanes<Compute<T>>::count) {
      softmax_gradient_block<T, kClasses, 1, kMasked>(tile, at, kClasses, u, present, registers, out);
    }
  } else {
    for (int at = 0; at < padded; at += kBlock<Compute<T>>) {
      softmax_gradient_block<T, 0, kBlockVectors, kMasked>(tile, at, classes, u, present, exponentials, out);
    }
  }
}

template <typename T, Activation kActivation>
TK_INLINE void channels_gradient(const Tile<T>& tile, int padded, int classes, int first_label, const Compute<T>* u,
                                 const GradientRows<T>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  using I = IntVector<A>;
  for (int c = 0; c < classes; ++c) {
    const V background = broadcast<A>(u[c * kCoefficients + kBackground]);
    const V foreground = broadcast<A>(u[c * kCoefficients + kForeground]);
    for (int i = 0; i < padded; i += Lanes<A>::count) {
      const I label = load<I>(tile.labels + i);
      V dz = label == static_cast<typename Lanes<A>::Int>(c + first_label) ? foreground : background;
      if constexpr (kActivation == Activation::kSigmoid) {
        const V z = load_logits(tile.rows + c * tile.row_stride + i);
        const V e = exp_nonpositive<A>(z < V{} ? z : -z);
        dz = logistic_gradient(e, 1 / (1 + e), dz);
      }
      if (tile.weights != nullptr) dz *= load<V>(tile.weights + i);
      store_logits(out.rows + c * out.row_stride + i, label >= 0 ? dz : V{});
    }
  }
}

template <typename T, bool kMasked>
TK_INLINE void gradient_tile(const Volume& v, const Tile<T>& tile, const Compute<T>* u, PresentClasses& present,
                             Vector<Compute<T>>* exponentials, const GradientRows<T>& out) {
  const int padded = tile.padded_voxels();
  const int classes = static_cast<int>(v.classes);
  const int first_label = static_cast<int>(v.first_label);
  switch (v.activation) {
    case Activation::kSoftmax:
      switch (classes) {
        case 2: return softmax_gradient_rows<T, 2, kMasked>(tile, padded, classes, u, present, exponentials, out);
        case 3: return softmax_gradient_rows<T, 3, kMasked>(tile, padded, classes, u, present, exponentials, out);
        case 4: return softmax_gradient_rows<T, 4, kMasked>(tile, padded, classes, u, present, exponentials, out);
        default: return softmax_gradient_rows<T, 0, kMasked>(tile, padded, classes, u, present, exponentials, out);
      }
    case Activation::kSigmoid:
      return channels_gradient<T, Activation::kSigmoid>(tile, padded, classes, first_label, u, out);
    case Activation::kNone: return channels_gradient<T, Activation::kNone>(tile, padded, classes, first_label, u, out);
  }
}

// Scratch: the tile's buffers, exponentials[C][kBlockVectors], gradient rows[C][tile voxels], present classes.
template <typename T>
int64_t scratch_bytes(const Volume& v) {
  return TileBuffers<T>::bytes(v) + v.classes * kBlockVectors * kVectorBytes +
         v.classes * TileBuffers<T>::voxels_per_tile(v) * static_cast<int64_t>(sizeof(T)) +
         PresentClasses::bytes(v.classes);
}

template <typename T>
void gradient(const Volume& v, int64_t sample, int64_t begin, int64_t end, const void* coefficients,
              const GradientView& view, void* scratch) {
  using A = Compute<T>;
  const A* u = static_cast<const A*>(coefficients);
  const TileBuffers<T> buffers(v, scratch);
  Vector<A>* exponentials = reinterpret_cast<Vector<A>*>(buffers.rest);
  T* buffer = reinterpret_cast<T*>(exponentials + v.classes * kBlockVectors);
  PresentClasses present(buffer + v.classes * buffers.tile_voxels, v.classes);
  BadInput bad;  // the count pass has told of it, and its coefficients are NaN then
  for (int64_t at = begin; at < end; at += buffers.tile_voxels) {
    const int voxels = static_cast<int>(smaller(buffers.tile_voxels, end - at));
    const Tile<T> tile = load_tile<T>(v, sample, at, voxels, buffers, bad);
    T* there = static_cast<T*>(view.data) + sample * view.sample_stride + at * view.voxel_stride;
    const bool direct = view.voxel_stride == 1 && voxels == tile.padded_voxels();
    const GradientRows<T> out =
        direct ? GradientRows<T>{there, view.class_stride} : GradientRows<T>{buffer, buffers.tile_voxels};
    if (tile.masked) {
      gradient_tile<T, true>(v, tile, u, present, exponentials, out);
    } else {
      gradient_tile<T, false>(v, tile, u, present, exponentials, out);
    }
    if (!direct) {
      copy_rows<true>(there, view.class_stride, view.voxel_stride, buffer, buffers.tile_voxels, v.classes, voxels);
    }
  }
}

}  // namespace

namespace tversky_kernels {
namespace cpu {

#define TK_JOIN_(a, b) a##_##b
#define TK_JOIN(a, b) TK_JOIN_(a, b)

void TK_JOIN(gradient_pass, TK_CAPABILITY)(const Volume& v, int64_t sample, int64_t begin, int64_t end,
                                           const void* coefficients, const GradientView& out, void* scratch) {
  switch (v.logits.type) {
    case ElementType::kDouble: return gradient<double>(v, sample, begin, end, coefficients, out, scratch);
    case ElementType::kHalf: return gradient<Half>(v, sample, begin, end, coefficients, out, scratch);
    case ElementType::kBFloat16: return gradient<BFloat16>(v, sample, begin, end, coefficients, out, scratch);
    default: return gradient<float>(v, sample, begin, end, coefficients, out, scratch);
  }
}

int64_t TK_JOIN(gradient_scratch_bytes, TK_CAPABILITY)(const Volume& v) {
  switch (v.logits.type) {
    case ElementType::kDouble: return scratch_bytes<double>(v);
    case ElementType::kFloat: return scratch_bytes<float>(v);
    default: return scratch_bytes<Half>(v);
  }
}

}  // namespace cpu
}  // namespace tversky_kernels
