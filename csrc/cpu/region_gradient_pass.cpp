// The gradient pass where voxels are counted by region. Compiled once per instruction set.
#include "regions.h"

namespace {

// u: a number for each lane, also where all lanes have the same one: that saves a kernel.
template <typename A>
void gradient_of_sorted(const Volume& v, const Tile<A>& tile, int padded, const Vector<A>* u, PresentClasses& present,
                        Vector<A>* scratch, const GradientRows<A>& out) {
  const int classes = static_cast<int>(v.classes), first_label = static_cast<int>(v.first_label);
  if (takes_general_kernels(v)) return general_gradient(v, tile, u, scratch, out);
  switch (v.activation) {
    case Activation::kSoftmax:
      return with_ce_forms(v, [&](auto cross_entropy, auto squared) {
        with_few_classes(classes, [&](auto few) {
          softmax_gradient_rows<A, decltype(few)::value, Labels::kSome, decltype(cross_entropy)::value,
                                decltype(squared)::value, false>(tile, padded, classes, u, present, scratch, out);
        });
      });
    case Activation::kSigmoid:
      return channels_gradient_tile<A, Activation::kSigmoid, true>(tile, padded, classes, first_label, u, present, out);
    case Activation::kNone:
      return channels_gradient_tile<A, Activation::kNone, true>(tile, padded, classes, first_label, u, present, out);
  }
}

constexpr int kScratchVectors = larger(2 * kBlockVectors, 4 * kGeneralVectors);

// Scratch: the tile, kScratchVectors a class, the coefficients of lanes [C][kAllCoefficients], present classes.
template <typename T>
int64_t scratch_bytes(const RegionVolume& r) {
  return RegionTile<T>::bytes(r) + r.volume.classes * (kScratchVectors + kAllCoefficients) * kVectorBytes +
         PresentClasses::bytes(r.volume.classes);
}

// table: [R][C][columns]; of_lanes: memory for [C][columns] vectors. out: rows where voxel 0 of the tile has its
// gradient.
template <typename T>
void gradient_in_place(const Volume& v, const RegionTile<T>& tile, const Compute<T>* table,
                       Vector<Compute<T>>* of_lanes, PresentClasses& present, const GradientRows<Compute<T>>& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  constexpr int kLanes = Lanes<A>::count;
  const int64_t row = v.classes * v.coefficient_columns();
  for (int i = 0; i < tile.voxels();) {
    const GradientRows<A> there{out.rows + i, out.row_stride, out.streamed};
    const int vectors = tile.uniform_vectors(i);
    if (vectors > 0) {
      const int voxels = vectors * kLanes;
      const A* const u = table + larger(tile.region_at(i), 0) * row;  // in no region: its labels do not count
      for (int64_t k = 0; k < row; ++k) of_lanes[k] = broadcast<A>(u[k]);
      gradient_of_sorted(v, tile.tile_in_place(i, voxels), voxels, of_lanes, present, static_cast<V*>(nullptr), there);
      i += voxels;
      continue;
    }
    for (int64_t k = 0; k < row; ++k) of_lanes[k] = V{};
    if (tile.is_scattered(i)) {
      A* const lanes = reinterpret_cast<A*>(of_lanes);
      for (int lane = 0; lane < kLanes; ++lane) {
        const A* const u = table + larger(tile.region_at(i + lane), 0) * row;
        for (int64_t k = 0; k < row; ++k) lanes[k * kLanes + lane] = u[k];
      }
      gradient_of_sorted(v, tile.tile_in_place(i, kLanes), kLanes, of_lanes, present, static_cast<V*>(nullptr), there);
      i += kLanes;
      continue;
    }
    tile.for_each_region(i, [&](int32_t region, auto mask) __attribute__((always_inline)) {
      const A* const u = table + region * row;
      for (int64_t k = 0; k < row; ++k) of_lanes[k] = mask ? broadcast<A>(u[k]) : of_lanes[k];
    });
    gradient_of_sorted(v, tile.tile_in_place(i, kLanes), kLanes, of_lanes, present, static_cast<V*>(nullptr), there);
    i += kLanes;
  }
}

template <typename T>
void gradient(const RegionVolume& r, int64_t sample, int64_t begin, int64_t end, const void* coefficients,
              const GradientView& view, void* scratch) {
  using A = Compute<T>;
  using V = Vector<A>;
  constexpr int kLanes = Lanes<A>::count, kStep = kBlock<A>;
  const Volume& v = r.volume;
  const int columns = v.coefficient_columns();
  const int64_t row = v.classes * columns;
  const A* const table = static_cast<const A*>(coefficients);
  RegionTile<T> tile(r, scratch);
  V* const block = reinterpret_cast<V*>(tile.rest);
  V* const of_lanes = block + v.classes * kScratchVectors;
  PresentClasses present(of_lanes + v.classes * kAllCoefficients, v.classes);
  BadInput bad;  // the count pass has reported it, and the coefficients are NaN then
  // A group's coefficients of class c; zeros where it is in no region.
  const auto coefficients_of = [&](const Group& group, int64_t c, A* to) {
    const int32_t region = tile.region(group, c);
    for (int q = 0; q < columns; ++q) to[q] = region < 0 ? A(0) : table[region * row + c * columns + q];
  };
  tile.allows_in_place = view.voxel_stride == 1;
  const bool streamed = is_streamed<T>(v, view, false) && tile.reads_blocks_in_place();
  const auto take_group = [&](const Group& group) {
    for (int64_t c = 0; c < v.classes; ++c) {
      A of_class[kAllCoefficients];
      coefficients_of(group, c, of_class);
      for (int q = 0; q < columns; ++q) of_lanes[c * columns + q] = broadcast<A>(of_class[q]);
    }
  };
  int taken = 0;
  for (int64_t at = begin; at < end; at += taken) {
    taken = tile.fill(sample, at, tile.take(end - at), bad);
    if constexpr (std::is_same_v<T, A>) {
      T* const out = static_cast<T*>(view.data) + sample * view.sample_stride + at;
      if (tile.in_place) {
        gradient_in_place(v, tile, table, of_lanes, present, GradientRows<A>{out, view.class_stride, streamed});
        continue;
      }
      if (tile.is_uniform && tile.group_count == 0) {  // in no region
        for (int64_t c = 0; c < v.classes; ++c) memset(out + c * view.class_stride, 0, taken * sizeof(T));
        continue;
      }
      if (tile.is_uniform) {
        take_group(tile.groups[0]);
        for (int from = 0; from < taken; from += kTileVoxels) {
          const int some = static_cast<int>(smaller(kTileVoxels, taken - from));
          const GradientRows<A> there{out + from, view.class_stride, streamed};
          gradient_of_sorted(v, tile.tile_in_place(from, some), some, of_lanes, present, block, there);
        }
        continue;
      }
    }
    for (int g = 0; g < tile.group_count; ++g) {
      const Group& group = tile.groups[g];
      const int whole = group.voxels / kStep * kStep;
      if (whole == 0) continue;
      take_group(group);
      for (int from = group.blocks_at; from < group.blocks_at + whole; from += kTileVoxels) {
        const int some = static_cast<int>(smaller(kTileVoxels, group.blocks_at + whole - from));
        const GradientRows<A> out{tile.rows + from, tile.row_stride(), false};
        gradient_of_sorted(v, tile.tile(from, some), some, of_lanes, present, block, out);
      }
    }
    for (int from = tile.whole_end; from < tile.positions; from += kStep) {
      const int32_t* const groups = tile.lane_groups + (from - tile.whole_end) / kBlockVectors;
      A* const lanes = reinterpret_cast<A*>(of_lanes);
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int64_t c = 0; c < v.classes; ++c) {
          A of_class[kAllCoefficients] = {};
          if (groups[lane] != kNoGroup) coefficients_of(tile.groups[groups[lane]], c, of_class);
          for (int q = 0; q < columns; ++q) lanes[(c * columns + q) * kLanes + lane] = of_class[q];
        }
      }
      const GradientRows<A> out{tile.rows + from, tile.row_stride(), false};
      gradient_of_sorted(v, tile.tile(from, kStep), kStep, of_lanes, present, block, out);
    }
    tile.spread_background();
    tile.scatter(view, sample, at);
  }
  if (streamed) finish_streams();
}

}  // namespace

namespace tversky_kernels {
namespace cpu {

void TK_JOIN(region_gradient_pass, TK_CAPABILITY)(const RegionVolume& r, int64_t sample, int64_t begin, int64_t end,
                                                  const void* coefficients, const GradientView& out, void* scratch) {
  with_logits_type(r.volume.logits.type,
                   [&](auto t) { gradient<decltype(t)>(r, sample, begin, end, coefficients, out, scratch); });
}

int64_t TK_JOIN(region_gradient_scratch_bytes, TK_CAPABILITY)(const RegionVolume& r) {
  return with_logits_type(r.volume.logits.type, [&](auto t) { return scratch_bytes<decltype(t)>(r); });
}

}  // namespace cpu
}  // namespace tversky_kernels
