// The count pass where voxels are counted by region. Compiled once per instruction set.
#include "regions.h"

namespace {

// padded: how many of the tile's voxels; a whole number of blocks or, for kernels that take one vector at a time, of
// vectors.
template <typename A>
void count_sorted(const Volume& v, const Tile<A>& tile, int padded, PresentClasses& present, LogitsVector<A>* scratch,
                  CountVectors<A>* sums, BadInput& bad) {
  const int classes = static_cast<int>(v.classes), first_label = static_cast<int>(v.first_label);
  if (takes_general_kernels(v)) return count_general(v, tile, scratch, sums, bad);
  switch (v.activation) {
    case Activation::kSoftmax:
      return with_ce_forms(v, [&](auto cross_entropy, auto squared) {
        with_few_classes(classes, [&](auto few) {
          count_softmax<A, decltype(few)::value, Labels::kSome, decltype(cross_entropy)::value,
                        decltype(squared)::value, false>(tile, padded, classes, present, scratch, sums);
        });
      });
    case Activation::kSigmoid:
      return count_channels<A, Activation::kSigmoid>(tile, padded, classes, first_label, present, sums);
    case Activation::kNone:
      return count_channels<A, Activation::kNone>(tile, padded, classes, first_label, present, sums);
  }
}

constexpr int kScratchVectors = larger(2 * kBlockVectors, 2 * kGeneralVectors);

// How many regions have their sums in vectors where voxels are counted in place: as many as a cache holds.
int slots_of(const Volume& v) {
  constexpr int64_t kMost = 256, kLeast = 16, kBytes = 1 << 20;
  return static_cast<int>(larger(kLeast, smaller(kMost, kBytes / (v.classes * kAllCounts * kVectorBytes))));
}

template <typename T>
int64_t scratch_bytes(const RegionVolume& r) {
  const int slots = slots_of(r.volume);
  return RegionTile<T>::bytes(r) + r.volume.classes * (kScratchVectors + kAllCounts * (1 + slots)) * kVectorBytes +
         slots * static_cast<int64_t>(kVectorBytes + sizeof(int32_t)) + PresentClasses::bytes(r.volume.classes);
}

// Adds the sums of some lanes to a region's rows: each class's to the region that the group has for that class.
template <typename T>
void add_to_rows(const RegionVolume& r, const RegionTile<T>& tile, const Group& group,
                 const CountVectors<Compute<T>>* sums, int first_lane, int last_lane, const RegionRows& rows) {
  const Volume& v = r.volume;
  const int columns = v.count_columns();
  double* of_region = r.by_class ? nullptr : rows.row(rows.context, tile.region(group, 0));
  for (int64_t c = 0; c < v.classes; ++c) {
    if (r.by_class) {
      const int32_t region = tile.region(group, c);
      if (region < 0) continue;
      of_region = rows.row(rows.context, region);
    }
    double* const row = of_region + c * (columns + 1);
    for (int q = 0; q < columns; ++q) {
      const bool of_all = q == kVoxels && !v.sums_label_weights();
      const auto* lanes = reinterpret_cast<const Compute<T>*>(&sums[of_all ? 0 : c][q]);
      double sum = static_cast<double>(lanes[first_lane]);
      for (int i = first_lane + 1; i < last_lane; ++i) sum += static_cast<double>(lanes[i]);
      row[q] += sum;
    }
  }
}

template <typename T>
void add_members(const RegionVolume& r, const RegionTile<T>& tile, const Group& group, const RegionRows& rows) {
  const int columns = r.volume.count_columns();
  double* of_region = r.by_class ? nullptr : rows.row(rows.context, tile.region(group, 0));
  for (int64_t c = 0; c < r.volume.classes; ++c) {
    if (r.by_class) {
      const int32_t region = tile.region(group, c);
      if (region < 0) continue;
      of_region = rows.row(rows.context, region);
    }
    of_region[c * (columns + 1) + columns] += static_cast<double>(group.members);
  }
}

// For tiles in place: the sums of some regions, a vector each, and how many of their voxels count.
template <typename T>
class RegionSums {
 public:
  using A = Compute<T>;
  using Counted = IntVector<A>;

  RegionSums(const RegionVolume& r, CountVectors<A>* sums, int32_t* buckets)
      : v_(r.volume),
        most_(slots_of(r.volume)),
        sums_(sums),
        counted_(reinterpret_cast<Counted*>(sums + most_ * r.volume.classes)),
        regions_(reinterpret_cast<int32_t*>(counted_ + most_)),
        slots_(buckets) {}

  // The slot of a region. Writes all slots out first where none is free.
  int slot(int32_t region, const RegionRows& rows) {
    if (slots_[region] >= 0) return slots_[region];
    if (used_ == most_) flush(rows);
    memset(sums_ + used_ * v_.classes, 0, v_.classes * sizeof(*sums_));
    counted_[used_] = Counted{};
    regions_[used_] = region;
    return slots_[region] = used_++;
  }
  CountVectors<A>* sums(int slot) { return sums_ + slot * v_.classes; }
  Counted& counted(int slot) { return counted_[slot]; }

  void flush(const RegionRows& rows) {
    const int columns = v_.count_columns();
    for (int i = 0; i < used_; ++i) {
      double* const row = rows.row(rows.context, regions_[i]);
      int64_t members = 0;
      for (int lane = 0; lane < Lanes<A>::count; ++lane) members += counted_[i][lane];
      for (int64_t c = 0; c < v_.classes; ++c) {
        for (int q = 0; q < columns; ++q) {
          const bool of_all = q == kVoxels && !v_.sums_label_weights();
          row[c * (columns + 1) + q] += horizontal_sum<A>(sums(i)[of_all ? 0 : c][q]);
        }
        row[c * (columns + 1) + columns] += static_cast<double>(members);
      }
      slots_[regions_[i]] = kNoGroup;
    }
    used_ = 0;
  }

 private:
  const Volume& v_;
  const int most_;
  CountVectors<A>* sums_;
  Counted* counted_;
  int32_t *regions_, *slots_;
  int used_ = 0;
};

// Adds each lane of a vector of voxels to its region's rows.
template <typename T>
void add_lanes(const Volume& v, const RegionTile<T>& tile, int at, const CountVectors<Compute<T>>* sums,
               const RegionRows& rows) {
  using A = Compute<T>;
  constexpr int kLanes = Lanes<A>::count;
  const int columns = v.count_columns();
  const auto labels = tile.labels_at(at);
  typename Lanes<A>::Int label[kLanes];
  memcpy(label, &labels, sizeof(label));
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t region = tile.region_at(at + lane);
    if (region < 0) continue;
    double* row = rows.row(rows.context, region);
    for (int64_t c = 0; c < v.classes; ++c) {
      for (int q = 0; q < columns; ++q) {
        const bool of_all = q == kVoxels && !v.sums_label_weights();
        *row++ += static_cast<double>(reinterpret_cast<const A*>(&sums[of_all ? 0 : c][q])[lane]);
      }
      *row++ += label[lane] >= 0;
    }
  }
}

template <typename T>
void count_in_place(const Volume& v, const RegionTile<T>& tile, PresentClasses& present,
                    CountVectors<Compute<T>>* of_vector, RegionSums<T>& sums, const RegionRows& rows, BadInput& bad) {
  using A = Compute<T>;
  constexpr int kLanes = Lanes<A>::count;
  const int columns = v.count_columns();
  for (int i = 0; i < tile.voxels();) {
    const int vectors = tile.uniform_vectors(i);
    if (vectors > 0) {
      const int32_t region = tile.region_at(i), end = i + vectors * kLanes;
      if (region >= 0) {
        const int slot = sums.slot(region, rows);
        count_sorted(v, tile.tile_in_place(i, vectors * kLanes), vectors * kLanes, present, nullptr, sums.sums(slot),
                     bad);
        for (; i < end; i += kLanes) sums.counted(slot) -= tile.labels_at(i) >= 0;
      }
      i = end;
      continue;
    }
    memset(of_vector, 0, v.classes * sizeof(*of_vector));
    count_sorted(v, tile.tile_in_place(i, kLanes), kLanes, present, nullptr, of_vector, bad);
    if (tile.is_scattered(i)) {
      add_lanes(v, tile, i, of_vector, rows);
      i += kLanes;
      continue;
    }
    const auto counted = tile.labels_at(i) >= 0;
    tile.for_each_region(i, [&](int32_t region, auto mask) __attribute__((always_inline)) {
      const int slot = sums.slot(region, rows);
      CountVectors<A>* const of_region = sums.sums(slot);
      for (int64_t c = 0; c < v.classes; ++c) {
        for (int q = 0; q < columns; ++q) add_where(mask, of_region[c][q], of_vector[c][q]);
      }
      sums.counted(slot) -= mask & counted;
    });
    i += kLanes;
  }
}

template <typename T>
void count(const RegionVolume& r, int64_t sample, int64_t begin, int64_t end, const RegionRows& rows, void* scratch,
           BadInput* bad) {
  using A = Compute<T>;
  constexpr int kLanes = Lanes<A>::count, kStep = kBlock<A>;
  const Volume& v = r.volume;
  RegionTile<T> tile(r, scratch);
  Vector<A>* const block = reinterpret_cast<Vector<A>*>(tile.rest);
  CountVectors<A>* const sums = reinterpret_cast<CountVectors<A>*>(block + v.classes * kScratchVectors);
  RegionSums<T> of_regions(r, sums + v.classes, tile.buckets());
  const int slots = slots_of(v);
  char* const after =
      reinterpret_cast<char*>(sums + (1 + slots) * v.classes) + slots * (kVectorBytes + sizeof(int32_t));
  PresentClasses present(after, v.classes);
  const auto clear = [&]() { memset(sums, 0, v.classes * sizeof(*sums)); };
  clear();
  for (int64_t at = begin; at < end;) {
    at += tile.fill(sample, at, tile.take(end - at), *bad);
    if (tile.in_place) {
      count_in_place(v, tile, present, sums, of_regions, rows, *bad);
      of_regions.flush(rows);
      clear();
      continue;
    }
    if (tile.is_uniform) {
      if (tile.group_count == 0) continue;
      add_members(r, tile, tile.groups[0], rows);
      for (int from = 0; from < tile.voxels(); from += kTileVoxels) {
        const int some = static_cast<int>(smaller(kTileVoxels, tile.voxels() - from));
        count_sorted(v, tile.tile_in_place(from, some), some, present, block, sums, *bad);
        add_to_rows(r, tile, tile.groups[0], sums, 0, kLanes, rows);
        clear();
      }
      continue;
    }
    for (int g = 0; g < tile.group_count; ++g) {
      const Group& group = tile.groups[g];
      add_members(r, tile, group, rows);
      const int whole = group.voxels / kStep * kStep;
      for (int from = 0; from < whole; from += kTileVoxels) {
        const int some = static_cast<int>(smaller(kTileVoxels, whole - from));
        count_sorted(v, tile.tile(group.blocks_at + from, some), some, present, block, sums, *bad);
        add_to_rows(r, tile, group, sums, 0, kLanes, rows);
        clear();
      }
    }
    for (int from = tile.whole_end; from < tile.positions; from += kStep) {
      count_sorted(v, tile.tile(from, kStep), kStep, present, block, sums, *bad);
      const int32_t* const groups = tile.lane_groups + (from - tile.whole_end) / kBlockVectors;
      for (int lane = 0; lane < kLanes;) {
        int last = lane + 1;
        while (last < kLanes && groups[last] == groups[lane]) ++last;
        if (groups[lane] != kNoGroup) add_to_rows(r, tile, tile.groups[groups[lane]], sums, lane, last, rows);
        lane = last;
      }
      clear();
    }
  }
}

}  // namespace

namespace tversky_kernels {
namespace cpu {

void TK_JOIN(region_count_pass, TK_CAPABILITY)(const RegionVolume& r, int64_t sample, int64_t begin, int64_t end,
                                               const RegionRows& rows, void* scratch, BadInput* bad) {
  with_logits_type(r.volume.logits.type,
                   [&](auto t) { count<decltype(t)>(r, sample, begin, end, rows, scratch, bad); });
}

int64_t TK_JOIN(region_count_scratch_bytes, TK_CAPABILITY)(const RegionVolume& r) {
  return with_logits_type(r.volume.logits.type, [&](auto t) { return scratch_bytes<decltype(t)>(r); });
}

}  // namespace cpu
}  // namespace tversky_kernels
