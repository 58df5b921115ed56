// Shared by the families: the counts of a tile, and the place of a tile's gradient.
#pragma once

#include "tile.h"

namespace {

template <typename T>
using LogitsVector = Vector<Compute<T>>;
template <typename T>
using CountVectors = LogitsVector<T>[kAllCounts];  // kVoxels: of class 0 only, but for Volume::sums_label_weights

// Accumulated in A inside a tile, in double across tiles.
template <typename A>
TK_INLINE void add_to_double(DoubleVector& total, Vector<A> v) {
  if constexpr (sizeof(A) == 8) {
    total += v;
  } else {
    typedef float HalfWidth __attribute__((vector_size(TK_VECTOR_BYTES / 2)));
    HalfWidth parts[2];
    memcpy(parts, &v, sizeof(v));
    total += __builtin_convertvector(parts[0], DoubleVector) + __builtin_convertvector(parts[1], DoubleVector);
  }
}

// Where the gradient of a tile goes: to rows of the gradient itself, or to a buffer that is copied there afterwards.
template <typename T>
struct GradientRows {
  T* rows;
  int64_t row_stride;
  bool streamed;  // past the caches
};

// Whether a gradient is stored past the caches. A large fresh one is: its memory would be read first, and would drive
// out the logits that are still to be read. inner: the classes of a voxel lie side by side.
template <typename T>
bool is_streamed(const Volume& v, const GradientView& view, bool inner) {
  constexpr int64_t kLeastBytes = int64_t{8} << 20, kLine = 64;  // the next reader of a smaller one finds it in a cache
  const auto is_aligned = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % kLine == 0; };
  return view.data != v.logits.data &&
         v.samples * v.classes * v.voxels * static_cast<int64_t>(sizeof(T)) >= kLeastBytes &&
         reinterpret_cast<uintptr_t>(view.data) % kLine == 0 && is_aligned(view.sample_stride) &&
         (inner || is_aligned(view.class_stride));
}

template <bool kCrossEntropy>
constexpr int kCoefficients = kCrossEntropy ? kAllCoefficients : kOverlapCoefficients;

// A pass has its coefficients as numbers (U is A), the same for all lanes, or as vectors (U is Vector<A>), a number for
// each lane. `spread` makes a vector of either.
template <typename A, typename U>
TK_INLINE Vector<A> spread(U x) {
  if constexpr (std::is_same_v<U, A>) {
    return broadcast<A>(x);
  } else {
    return x;
  }
}

// All classes' dL/dsmoothing.
template <typename A, typename U>
TK_INLINE U sum_of_smoothing(const U* u, int classes) {
  if constexpr (std::is_same_v<U, A>) {
    double sum = 0;
    for (int c = 0; c < classes; ++c) sum += u[c * kAllCoefficients + kSmoothingCoefficient];
    return static_cast<A>(sum);
  } else {
    U sum{};
    for (int c = 0; c < classes; ++c) sum += u[c * kAllCoefficients + kSmoothingCoefficient];
    return sum;
  }
}

}  // namespace
