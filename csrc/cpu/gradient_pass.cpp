// The gradient pass on the CPU: logits, target and coefficients in, dL/dlogits out. Compiled once per instruction set.
#include "tile.h"

namespace {

// Where a tile's gradient goes: rows of A, either the gradient itself or a buffer that is narrowed or strided
// afterwards.
template <typename A>
struct GradientRows {
  A* rows;
  int64_t row_stride;
};

enum Coefficient { kBackground, kForeground, kCoefficients };

template <typename A, bool kMasked>
TK_INLINE void two_classes_gradient(const Tile<A>& tile, int padded, const A* u, const GradientRows<A>& out) {
  using V = Vector<A>;
  using I = IntVector<A>;
  const A difference0 = u[kCoefficients + kBackground] - u[kForeground];  // u_1 - u_0 where the label is 0
  const A difference1 = u[kCoefficients + kForeground] - u[kBackground];  // where it is 1
  for (int i = 0; i < padded; i += Lanes<A>::count) {
    const I label = load<I>(tile.labels + i);
    const V d = two_class_logit(load<V>(tile.rows + i), load<V>(tile.rows + tile.row_stride + i));
    const V e = exp_nonpositive<A>(d < V{} ? d : -d);
    const V inverse = 1 / (1 + e);
    V dz1 = logistic_gradient(e, inverse, label == 1 ? broadcast<A>(difference1) : broadcast<A>(difference0));
    if (tile.weights != nullptr) dz1 *= load<V>(tile.weights + i);
    if (kMasked) dz1 = label >= 0 ? dz1 : V{};
    store(out.rows + i, -dz1);
    store(out.rows + out.row_stride + i, dz1);
  }
}

template <typename A, int kClasses, int kVectors, bool kMasked>
TK_INLINE void softmax_gradient_block(const Tile<A>& tile, int at, int runtime_classes, const A* u,
                                      PresentClasses& present, Vector<A>* exponentials, const GradientRows<A>& out) {
  using V = Vector<A>;
  using I = IntVector<A>;
  using Int = typename Lanes<A>::Int;
  constexpr int kLanes = Lanes<A>::count;
  constexpr bool kFew = kClasses > 0;
  const int classes = kFew ? kClasses : runtime_classes;
  const A* rows = tile.rows + at;

  V top[kVectors];
  I label[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    top[k] = load<V>(rows + k * kLanes);
    label[k] = load<I>(tile.labels + at + k * kLanes);
  }
#pragma GCC unroll 8
  for (int c = 1; c < classes; ++c) {
    const A* row = rows + c * tile.row_stride;
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      top[k] = maximum(top[k], load<V>(row + k * kLanes));
      if (!kFew) prefetch(row + (kVectors + k) * kLanes);
    }
  }
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, true);

  SoftmaxSums<V> sums[kVectors];
  V weighted_others[kVectors] = {}, u_target[kVectors] = {};
#pragma GCC unroll 8
  for (int c = 0; c < classes; ++c) {
    const A* row = rows + c * tile.row_stride;
    const V background = broadcast<A>(u[c * kCoefficients + kBackground]);
    const V foreground = broadcast<A>(u[c * kCoefficients + kForeground]);
    const bool is_present = kFew || present.has(c);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const V e = exp_nonpositive<A>(load<V>(row + k * kLanes) - top[k]);
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
    A* row = out.rows + at + c * out.row_stride;
    const V background = broadcast<A>(u[c * kCoefficients + kBackground]);
    const bool is_present = kFew || present.has(c);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      V dz = gradient[k].other(exponentials[c * kVectors + k], background);
      if (is_present) dz = label[k] == static_cast<Int>(c) ? gradient[k].at_target : dz;
      store(row + k * kLanes, dz);
    }
  }
  if (!kFew) present.set(tile.labels + at, kVectors * kLanes, false);
}

template <typename A, int kClasses, bool kMasked>
TK_INLINE void softmax_gradient_rows(const Tile<A>& tile, int padded, int classes, const A* u, PresentClasses& present,
                                     Vector<A>* exponentials, const GradientRows<A>& out) {
  if constexpr (kClasses == 2) {
    two_classes_gradient<A, kMasked>(tile, padded, u, out);
  } else if constexpr (kClasses > 0) {
    Vector<A> registers[kClasses];
    for (int at = 0; at < padded; at += Lanes<A>::count) {
      softmax_gradient_block<A, kClasses, 1, kMasked>(tile, at, kClasses, u, present, registers, out);
    }
  } else {
    for (int at = 0; at < padded; at += kBlock<A>) {
      softmax_gradient_block<A, 0, kBlockVectors, kMasked>(tile, at, classes, u, present, exponentials, out);
    }
  }
}

template <typename A, Activation kActivation>
TK_INLINE void channels_gradient(const Tile<A>& tile, int padded, int classes, int first_label, const A* u,
                                 const GradientRows<A>& out) {
  using V = Vector<A>;
  using I = IntVector<A>;
  for (int c = 0; c < classes; ++c) {
    const V background = broadcast<A>(u[c * kCoefficients + kBackground]);
    const V foreground = broadcast<A>(u[c * kCoefficients + kForeground]);
    for (int i = 0; i < padded; i += Lanes<A>::count) {
      const I label = load<I>(tile.labels + i);
      V dz = label == static_cast<typename Lanes<A>::Int>(c + first_label) ? foreground : background;
      if constexpr (kActivation == Activation::kSigmoid) {
        const V z = load<V>(tile.rows + c * tile.row_stride + i);
        const V e = exp_nonpositive<A>(z < V{} ? z : -z);
        dz = logistic_gradient(e, 1 / (1 + e), dz);
      }
      if (tile.weights != nullptr) dz *= load<V>(tile.weights + i);
      store(out.rows + c * out.row_stride + i, label >= 0 ? dz : V{});
    }
  }
}

template <typename A, bool kMasked>
TK_INLINE void gradient_tile(const Volume& v, const Tile<A>& tile, const A* u, PresentClasses& present,
                             Vector<A>* exponentials, const GradientRows<A>& out) {
  const int padded = (tile.voxels + kBlock<A> - 1) / kBlock<A> * kBlock<A>;
  const int classes = static_cast<int>(v.classes);
  const int first_label = static_cast<int>(v.first_label);
  switch (v.activation) {
    case Activation::kSoftmax:
      switch (classes) {
        case 2: return softmax_gradient_rows<A, 2, kMasked>(tile, padded, classes, u, present, exponentials, out);
        case 3: return softmax_gradient_rows<A, 3, kMasked>(tile, padded, classes, u, present, exponentials, out);
        case 4: return softmax_gradient_rows<A, 4, kMasked>(tile, padded, classes, u, present, exponentials, out);
        default: return softmax_gradient_rows<A, 0, kMasked>(tile, padded, classes, u, present, exponentials, out);
      }
    case Activation::kSigmoid:
      return channels_gradient<A, Activation::kSigmoid>(tile, padded, classes, first_label, u, out);
    case Activation::kNone: return channels_gradient<A, Activation::kNone>(tile, padded, classes, first_label, u, out);
  }
}

// Scratch: the tile's buffers, exponentials[C][kBlockVectors], gradient rows[C][tile voxels], present classes.
template <typename A>
int64_t scratch_bytes(const Volume& v) {
  return TileBuffers<A>::bytes(v) + v.classes * kBlockVectors * kVectorBytes +
         v.classes * TileBuffers<A>::voxels_per_tile(v) * static_cast<int64_t>(sizeof(A)) +
         PresentClasses::bytes(v.classes);
}

template <typename T, typename A>
void gradient(const Volume& v, int64_t sample, int64_t begin, int64_t end, const A* coefficients,
              const GradientView& view, void* scratch) {
  const TileBuffers<A> buffers(v, scratch);
  Vector<A>* exponentials = reinterpret_cast<Vector<A>*>(buffers.rest);
  A* buffer = reinterpret_cast<A*>(exponentials + v.classes * kBlockVectors);
  PresentClasses present(buffer + v.classes * buffers.tile_voxels, v.classes);
  BadInput bad;  // the count pass has told of it, and its coefficients are NaN then
  for (int64_t at = begin; at < end; at += buffers.tile_voxels) {
    const int voxels = static_cast<int>(smaller(buffers.tile_voxels, end - at));
    const Tile<A> tile = load_tile<T, A>(v, sample, at, voxels, buffers, bad);
    T* p = static_cast<T*>(view.data) + sample * view.sample_stride + at * view.voxel_stride;
    const bool direct = sizeof(T) == sizeof(A) && view.voxel_stride == 1 && voxels % kBlock<A> == 0;
    const GradientRows<A> out = direct ? GradientRows<A>{reinterpret_cast<A*>(p), view.class_stride}
                                       : GradientRows<A>{buffer, buffers.tile_voxels};
    if (tile.masked) {
      gradient_tile<A, true>(v, tile, coefficients, present, exponentials, out);
    } else {
      gradient_tile<A, false>(v, tile, coefficients, present, exponentials, out);
    }
    if (!direct) {
      for (int64_t c = 0; c < v.classes; ++c) {
        narrow_row<T, A>(buffer + c * buffers.tile_voxels, p + c * view.class_stride, view.voxel_stride, voxels);
      }
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
  const float* u = static_cast<const float*>(coefficients);
  switch (v.logits.type) {
    case ElementType::kDouble:
      return gradient<double, double>(v, sample, begin, end, static_cast<const double*>(coefficients), out, scratch);
    case ElementType::kHalf: return gradient<Half, float>(v, sample, begin, end, u, out, scratch);
    case ElementType::kBFloat16: return gradient<BFloat16, float>(v, sample, begin, end, u, out, scratch);
    default: return gradient<float, float>(v, sample, begin, end, u, out, scratch);
  }
}

int64_t TK_JOIN(gradient_scratch_bytes, TK_CAPABILITY)(const Volume& v) {
  return v.logits.type == ElementType::kDouble ? scratch_bytes<double>(v) : scratch_bytes<float>(v);
}

}  // namespace cpu
}  // namespace tversky_kernels
