// Copies between class-inner memory (channels_last: the classes of a voxel lie side by side) and rows of one class, in
// registers. simd.h says why all of this has internal linkage.
#pragma once

#include <utility>

#include "simd.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TK_HAS_SHUFFLES 1
#endif
#endif

namespace {

// As many stored elements as a vector of the type of the computation has lanes.
template <typename T>
struct Stored {
  using Vector = HalfVector;
};
template <>
struct Stored<float> {
  using Vector = FloatVector;
};
template <>
struct Stored<double> {
  using Vector = DoubleVector;
};

// Rows of a buffer, of one vector of voxels.
template <typename T>
struct BufferRows {
  using V = typename Stored<T>::Vector;
  T* first;
  int64_t stride;
  TK_INLINE V get(int c) const { return load<V>(first + c * stride); }
  TK_INLINE void put(int c, V v) const { store(first + c * stride, v); }
};

#if defined(TK_HAS_SHUFFLES)

// Up to this many classes, rows are made of the few vectors that hold all of their voxels: the vectors are halved while
// the number of classes is even, then each class is picked out of them.
constexpr int kMostPicked = 8;

// Lane `i` of the row of class c is element i * C + c of the C vectors. step(j): the element that lane i takes from
// (row so far, vector j).
template <int C, int kLanes>
constexpr int picked_lane(int c, int j, int i) {
  const int at = i * C + c;
  return at / kLanes == j ? kLanes + at % kLanes : j == 1 && at / kLanes == 0 ? at : i;
}
// Lane `i` of vector v is class (v * kLanes + i) % C of voxel (v * kLanes + i) / C.
template <int C, int kLanes>
constexpr int placed_lane(int v, int c, int i) {
  const int at = v * kLanes + i;
  return at % C == c ? kLanes + at / C : c == 1 && at % C == 0 ? at / C : i;
}

template <int C, int c, int j, typename V, int... I>
TK_INLINE V pick_step(V row, V vector, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(row, vector, picked_lane<C, sizeof...(I)>(c, j, I)...);
}
template <int C, int v, int c, typename V, int... I>
TK_INLINE V place_step(V vector, V row, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(vector, row, placed_lane<C, sizeof...(I)>(v, c, I)...);
}
template <int C, int c, int kLanes, typename V, int... J>
TK_INLINE V pick(const V* vectors, std::integer_sequence<int, J...>) {
  V row = vectors[0];
  ((row = pick_step<C, c, J + 1>(row, vectors[J + 1], std::make_integer_sequence<int, kLanes>{})), ...);
  return row;
}
template <int C, int v, int kLanes, typename V, int... J>
TK_INLINE V place(const V* rows, std::integer_sequence<int, J...>) {
  V vector = rows[0];
  ((vector = place_step<C, v, J + 1>(vector, rows[J + 1], std::make_integer_sequence<int, kLanes>{})), ...);
  return vector;
}

// Where the number of classes is even, every second element is one of half as many classes. kOdd: from the second one
// on.
template <bool kOdd, typename V, int... I>
TK_INLINE V every_second(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, 2 * I + kOdd...);
}
// The opposite: a and b in turn. kHigh: the second half of the result, else the first.
template <bool kHigh, typename V, int... I>
TK_INLINE V in_turn(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I % 2) * kLanes + kHigh * kLanes / 2 + I / 2)...);
}

template <int C, int kLanes, typename V>
TK_INLINE void vectors_to_rows(V* v);
template <int C, int kLanes, typename V>
TK_INLINE void rows_to_vectors(V* v);

template <int kLanes, typename V, int... J>
TK_INLINE void halve_to_rows(V* v, std::integer_sequence<int, J...>) {
  constexpr int kHalf = sizeof...(J);
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  V even[] = {every_second<false>(v[2 * J], v[2 * J + 1], lanes)...};
  V odd[] = {every_second<true>(v[2 * J], v[2 * J + 1], lanes)...};
  vectors_to_rows<kHalf, kLanes>(even);
  vectors_to_rows<kHalf, kLanes>(odd);
  ((v[2 * J] = even[J], v[2 * J + 1] = odd[J]), ...);
}
template <int kLanes, typename V, int... J>
TK_INLINE void halve_to_vectors(V* v, std::integer_sequence<int, J...>) {
  constexpr int kHalf = sizeof...(J);
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  V even[] = {v[2 * J]...}, odd[] = {v[2 * J + 1]...};
  rows_to_vectors<kHalf, kLanes>(even);
  rows_to_vectors<kHalf, kLanes>(odd);
  ((v[2 * J] = in_turn<false>(even[J], odd[J], lanes), v[2 * J + 1] = in_turn<true>(even[J], odd[J], lanes)), ...);
}
template <int kLanes, typename V, int... K>
TK_INLINE void pick_all(V* v, std::integer_sequence<int, K...>) {
  constexpr std::make_integer_sequence<int, sizeof...(K) - 1> others{};
  const V rows[] = {pick<sizeof...(K), K, kLanes>(v, others)...};
  ((v[K] = rows[K]), ...);
}
template <int kLanes, typename V, int... K>
TK_INLINE void place_all(V* v, std::integer_sequence<int, K...>) {
  constexpr std::make_integer_sequence<int, sizeof...(K) - 1> others{};
  const V vectors[] = {place<sizeof...(K), K, kLanes>(v, others)...};
  ((v[K] = vectors[K]), ...);
}

// The C vectors of one vector of voxels become the rows of their classes; and the other way round.
template <int C, int kLanes, typename V>
TK_INLINE void vectors_to_rows(V* v) {
  if constexpr (C % 2 == 0) {
    halve_to_rows<kLanes>(v, std::make_integer_sequence<int, C / 2>{});
  } else if constexpr (C > 1) {
    pick_all<kLanes>(v, std::make_integer_sequence<int, C>{});
  }
}
template <int C, int kLanes, typename V>
TK_INLINE void rows_to_vectors(V* v) {
  if constexpr (C % 2 == 0) {
    halve_to_vectors<kLanes>(v, std::make_integer_sequence<int, C / 2>{});
  } else if constexpr (C > 1) {
    place_all<kLanes>(v, std::make_integer_sequence<int, C>{});
  }
}

template <bool kScatter, int C, typename T, typename Rows, int... K>
TK_INLINE void copy_few_classes(T* at, Rows& rows, bool streamed, std::integer_sequence<int, K...>) {
  using V = typename Stored<T>::Vector;
  constexpr int kLanes = sizeof(V) / sizeof(T);
  V vectors[C];
  if (kScatter) {
    ((vectors[K] = rows.get(K)), ...);
    rows_to_vectors<C, kLanes>(vectors);
    (store(at + K * kLanes, vectors[K], streamed), ...);
  } else {
    ((vectors[K] = load<V>(at + K * kLanes)), ...);
    vectors_to_rows<C, kLanes>(vectors);
    (rows.put(K, vectors[K]), ...);
  }
}

// One stage of the transposition of a square of vectors: swaps its off-diagonal blocks of kDistance.
template <int kDistance, typename V, int... I>
TK_INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I);
  const V first = __builtin_shufflevector(a, b, ((I & kDistance) == 0 ? I : kLanes + I - kDistance)...);
  b = __builtin_shufflevector(a, b, ((I & kDistance) == 0 ? I + kDistance : kLanes + I)...);
  a = first;
}
// The pairs of one stage. J is 0 ... kLanes / 2; its bits around the bit of kDistance are the first of the pair.
constexpr int first_of_pair(int j, int distance) {
  return j / distance * 2 * distance + j % distance;
}
template <int kDistance, typename V, int... J>
TK_INLINE void transpose(V* square, std::integer_sequence<int, J...> pairs) {
  if constexpr (kDistance > 0) {
    constexpr std::make_integer_sequence<int, 2 * sizeof...(J)> lanes{};
    (exchange<kDistance>(square[first_of_pair(J, kDistance)], square[first_of_pair(J, kDistance) + kDistance], lanes),
     ...);
    transpose<kDistance / 2>(square, pairs);
  }
}

// A square of voxels x classes; the classes begin with `first`, and `inside` of them exist. Indices are constants
// throughout, so the square stays in registers.
template <bool kScatter, typename T, typename Rows, int... K>
TK_INLINE void copy_square(T* at, int classes, Rows& rows, int first, int inside, bool streamed,
                           std::integer_sequence<int, K...>) {
  using V = typename Stored<T>::Vector;
  constexpr int kLanes = sizeof...(K);
  constexpr std::make_integer_sequence<int, kLanes / 2> pairs{};
  constexpr int kLast = kLanes - 1;
  V square[kLanes];
  // With fewer classes than lanes the vector of a voxel reaches into the next voxel. The vector of the last one must
  // not.
  static_assert(2 * (kMostPicked + 1) >= kLanes, "so that it does not reach beyond that");
  T* const voxel = at + first;
  if (kScatter) {
    ((square[K] = K < inside ? rows.get(first + K) : V{}), ...);
    transpose<kLanes / 2>(square, pairs);
    // In this order the store of the next voxel repairs the elements that are written too much.
    ((K < kLast || inside == kLanes ? store(voxel + K * classes, square[K], streamed)
                                    : store_first(voxel + K * classes, square[K], inside)),
     ...);
  } else {
    ((square[K] =
          K < kLast || inside == kLanes ? load<V>(voxel + K * classes) : load_first<V>(voxel + K * classes, inside)),
     ...);
    transpose<kLanes / 2>(square, pairs);
    ((K < inside ? rows.put(first + K, square[K]) : void()), ...);
  }
}

template <bool kScatter, int C, typename T, typename Rows>
TK_INLINE bool copy_few_classes_of(int classes, T* at, Rows& rows, bool streamed) {
  if (classes == C) {
    copy_few_classes<kScatter, C>(at, rows, streamed, std::make_integer_sequence<int, C>{});
    return true;
  }
  if constexpr (C < kMostPicked) {
    return copy_few_classes_of<kScatter, C + 1>(classes, at, rows, streamed);
  } else {
    return false;
  }
}

// One vector of voxels with 2 and more classes. rows.put takes their rows or, with kScatter, rows.get gives them.
// streamed: past the caches; then the classes of the voxels must be whole vectors, or few.
template <bool kScatter, typename T, typename Rows>
TK_INLINE void copy_vector_of_voxels(T* at, int classes, Rows& rows, bool streamed = false) {
  constexpr int kLanes = sizeof(typename Stored<T>::Vector) / sizeof(T);
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  if (copy_few_classes_of<kScatter, 2>(classes, at, rows, streamed)) return;
  if (classes <= kLanes) return copy_square<kScatter>(at, classes, rows, 0, classes, streamed, lanes);
  for (int c = 0; c < classes; c += kLanes) {
    const int first = c + kLanes <= classes ? c : classes - kLanes;  // the last square overlaps the one before
    copy_square<kScatter>(at, classes, rows, first, kLanes, streamed, lanes);
  }
}

#endif

// Copies voxels whose classes lie side by side, one voxel after the other, to rows or, with kScatter, back. Returns how
// many voxels it has copied, from the first one on: whole vectors.
template <bool kScatter, typename T>
int copy_class_inner(T* at, int classes, T* rows, int64_t row_stride, int count) {
#if defined(TK_HAS_SHUFFLES)
  constexpr int kLanes = sizeof(typename Stored<T>::Vector) / sizeof(T);
  const int whole = count / kLanes * kLanes;
  if (classes < 2) return 0;
  for (int i = 0; i < whole; i += kLanes) {
    BufferRows<T> of_vector{rows + i, row_stride};
    copy_vector_of_voxels<kScatter>(at + i * classes, classes, of_vector);
  }
  return whole;
#else
  return 0;
#endif
}

}  // namespace
