// The launches, as the operators call them. Every launch is on the given stream; none waits.
#pragma once

#include <type_traits>

#include "../table.h"
#include "../views.h"
#include "platform.h"

namespace tversky_kernels {
namespace cuda {

// The blocks of a sample (or of a channel), in groups of about as many as run at the same time. A group has
// neighbouring pieces of the volume, through which its blocks step side by side: so what is read at one time is at one
// place in memory, and the groups, which start one after another, go from one end of it to the other.
struct Blocks {
  int programs;  // how many: whole groups
  int group;     // blocks of each
  int piece;     // voxels that a block takes at once
  int pieces;    // of each group
  int longer;    // so many groups have one more
};

// The count pass goes through the volume from its end, where what wrote the logits has stopped, and the gradient pass
// from its beginning, where the count pass has: there the L2 cache has them.
enum class Order { kForward, kBackward };

// The lanes that share a voxel and the warps that these are in, as logarithms.
struct SplitShape {
  int log_lanes;
  int log_warps;
};

// How a pass is cut up. The same for both passes and for every value of the data.
struct Plan {
  Blocks blocks;
  int voxels;        // a thread (in registers) or a block (tiled) takes at once
  int lanes;         // threads in whose registers all classes of a voxel are; 0: none, but see by_channel, or tiled
  int warps;         // over which these threads are spread
  bool split;        // the classes of a voxel are split over the lanes (it may be one): see split.cuh
  bool general;      // split: by the kernels for a target of its own for every class, which also read resampled ones
  bool dense;        // general: by those for dense targets of the logits' size, made of products and no powers
  bool interleaved;  // split: the classes of a voxel lie side by side
  bool by_channel;   // a block takes one channel: the blocks are a sample's and class's
  int shared_bytes;  // of a block
  static constexpr int kThreads = 256;

  static int log2(int power) { return power > 1 ? 1 + log2(power / 2) : 0; }
  SplitShape shape() const { return {log2(lanes), log2(warps)}; }
};

// out: of the gradient pass; null: the count pass. multiprocessors: of the device.
Plan make_plan(const Volume& volume, const GradientView* out, int multiprocessors);

// partial[sample][program][column][C] for the columns of enum Count, float (double for double logits). *finished
// becomes 0.
void launch_count_pass(const Volume& volume, const Plan& plan, void* partial, unsigned* finished, cudaStream_t stream);

struct TableArguments {
  Table table;
  const void* partial;  // as above, or null: `counts` holds the sums already
  bool partial_is_double;
  bool begins_early;   // its launch may begin while the count pass, launched right before, is still running
  bool rehearses;      // and then goes through its instructions once before it waits: see table_kernel
  unsigned* finished;  // blocks that have summed their part of partial; 0
  int programs;
  double* counts;  // [N][C][columns], written from partial
  void* loss;      // null: the counts are all that is wanted
  bool loss_is_double;
  double* coefficients;  // [rows][C][2 or 4]
};
void launch_table(const TableArguments& arguments, cudaStream_t stream);

// Blocks of a pass.
inline dim3 grid_of(const Volume& v, const Plan& plan) {
  return dim3(static_cast<unsigned>(v.samples * (plan.by_channel ? v.classes : 1) * plan.blocks.programs));
}

struct GradientArguments {
  const void* grad_loss;
  bool grad_is_double;
  int64_t grad_classes;  // 0: one value; else C' values a row
  const double* coefficients;
  int64_t row_stride;  // 0: one row of coefficients for all samples; else 1
  GradientView out;
};
void launch_gradient_pass(const Volume& volume, const Plan& plan, const GradientArguments& arguments,
                          cudaStream_t stream);

// ---- Shared by the two passes

// Of the kernels in tiles only those for a target of its own for every class have squares.
inline bool takes_general_tiles(const Volume& v) {
  return v.is_general() || v.overlap == OverlapForm::kSquared;
}

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

// Classes that fit in a thread's registers; more of float64 would spill.
template <typename T>
constexpr int kMostInRegisters = sizeof(T) == 8 ? 3 : 4;

// Blocks of a multiprocessor at the least, which bounds the registers of the kernels that hold all classes in them.
template <int kClasses, CrossEntropy kCeForm>
constexpr int kFewBlocks = kClasses == 2 && kCeForm == CrossEntropy::kNone ? 4 : 2;

// Calls f with the number of classes, 2 to kMostInRegisters<T>, as a constant.
template <typename T, int kClasses = 2, typename F>
void with_few_classes(int64_t classes, F&& f) {
  if (classes == kClasses) {
    f(std::integral_constant<int, kClasses>{});
  } else if constexpr (kClasses < kMostInRegisters<T>) {
    with_few_classes<T, kClasses + 1>(classes, f);
  }
}

// Whether the count pass brings the next voxels to shared memory while a thread that has all classes of some works on
// these. The gradient pass waits for memory anyway, two classes have so many threads at once that it gains nothing, and
// a copy has 4 bytes at least, of labels too.
template <typename T>
constexpr bool few_come_ahead(int classes) {
  return sizeof(T) < 8 && classes > 2;
}

// Where the classes of a voxel are split over the lanes of a warp: blocks of a multiprocessor, which bounds the
// registers, and the voxels that a lane works on at a time; the most lanes and the most classes of one, where a label
// is the target and where every class has a target of its own.
constexpr int kSplitBlocks = 2, kSplitVoxels = 4;
// Whether the next voxels are brought to shared memory while these are worked on. The gradient pass of float32 waits
// for memory anyway, and was slower so.
template <typename T, bool kGradient>
constexpr bool kAhead = !kGradient || sizeof(T) == 2;
// The same of a dense target and its logits, and blocks of a multiprocessor there: of two classes, which take few
// registers, so many that others work while some wait.
template <typename T, int kClasses, bool kGradient>
constexpr bool kDenseAhead = kClasses > 2 && kAhead<T, kGradient>;
template <int kClasses, bool kGradient>
constexpr int kDenseBlocks = kClasses > 2 ? kSplitBlocks
                             : kGradient  ? 3
                                          : 4;
// The same of tiles (interleaved.cuh): two of them in float32 would leave an sm_80 one block a multiprocessor.
template <typename T>
constexpr bool kTileAhead = sizeof(T) == 2;
// Classes that a lane takes from a tile by one access, where it has at most so many.
template <int kClasses>
constexpr int kUnitOf = kClasses % 2 == 0 ? 2 : 1;
// A row of a tile: as few packs as are whole pieces of 16 bytes.
struct RowOfTile {
  int packs;   // of kSplitVoxels voxels
  int pieces;  // that it has
  int stride;  // pieces from one row to the next, an odd number: rows begin in different banks
  __host__ __device__ RowOfTile(int classes, int element_size)
      : packs(classes * kSplitVoxels * element_size % 16 == 0 ? 1 : 2),
        pieces(classes * kSplitVoxels * packs * element_size / 16),
        stride(pieces | 1) {}
};
// A ninth class of a lane instead of twice the lanes: there are often 8, 16 or 32 organs and the background.
// Of squares there are none such.
constexpr int kMostLanes = 16, kMostOfLane = 9, kMostOfLaneSquared = 8;
constexpr int kMostLanesGeneral = 32, kMostOfLaneGeneral = 4, kMostOfLaneDense = 5;
// Lanes of a warp that share a voxel; more are in several warps. So a warp reads a class's voxels in pieces of 128
// bytes (64 in half precision): in smaller ones memory comes at half its speed.
constexpr int kMostLanesOfWarp = 4;
// Where warps share voxels, the first floats of the shared memory are for what each tells the others. Every exchange of
// a voxel's values has a place of its own, for [warps of the block][so many of each voxel]: the next exchange may begin
// while a warp still reads what it was told in this one.
struct ExchangePlace {
  int start, of_warp;
};
constexpr int kExchangedVoxels = kSplitVoxels * kWarp / kMostLanesOfWarp;  // of a warp
constexpr ExchangePlace place_after(const ExchangePlace& before, int values) {
  return {before.start + Plan::kThreads / kWarp * before.of_warp, values * kExchangedVoxels};
}
constexpr ExchangePlace kDiffers = place_after({0, 0}, 1), kTops = place_after(kDiffers, 1);
constexpr ExchangePlace kTopSums = place_after(kTops, 2), kSums = place_after(kTopSums, 3);
constexpr int kExchange = place_after(kSums, 0).start;

// Lanes that share a voxel: as few as possible. 0: there are too many classes.
inline int split_lanes(int64_t classes, int most_lanes, int most_of_lane) {
  int lanes = 1;
  while (lanes <= most_lanes && classes > lanes * most_of_lane) lanes *= 2;
  return lanes <= most_lanes ? lanes : 0;
}

// The values of each thread that has its classes in registers: the counts' columns, of which a cross-entropy has one or
// (smoothed) two more and, from kWeights on, the sum of the weights (of squares, those of each label: see
// Volume::sums_label_weights).
template <CrossEntropy kCeForm>
constexpr int kWeights = kCeForm == CrossEntropy::kSmoothed ? kVoxels : kSmoothing;
template <CrossEntropy kCeForm, bool kSquared>
constexpr int count_values(int classes) {
  return kCeForm == CrossEntropy::kNone ? kOverlapCounts * classes
                                        : kWeights<kCeForm> * classes + (kSquared ? classes : 1);
}

// What LabelSums (voxels.cuh) keeps of each class, in whole words: tp, fn and with a cross-entropy ce and, of squares,
// the weights, of smoothing, the logarithms; and the values of a block whose threads have so many classes.
template <bool kCrossEntropy>
constexpr int kLabelColumns = kCrossEntropy ? 4 : 2;
template <bool kCrossEntropy>
constexpr int label_sum_values(int classes) {
  return (classes + 1) * kLabelColumns<kCrossEntropy> * Plan::kThreads;
}

// The values of a block whose threads have all classes in their registers: those of each warp, and before them what
// LabelSums keeps; whole words of 16 bytes, for such lie behind them.
template <CrossEntropy kCeForm, bool kSquared>
constexpr int few_sum_values(int classes) {
  const int of_warps = Plan::kThreads / kWarp * count_values<kCeForm, kSquared>(classes);
  const int of_labels = classes > 2 ? label_sum_values<kCeForm != CrossEntropy::kNone>(classes) : 0;
  return ((of_warps > of_labels ? of_warps : of_labels) + 3) & ~3;
}

// Calls f with the most classes of a lane as a constant; every lane has all of them but the last two at least.
// kSquared: one lane for three and four classes too, which without squares have kernels of their own, and no nine.
// These and kSmoothed have no five and seven, for they are rarer and every kernel is compiled.
template <bool kSquared, bool kSmoothed, typename F>
void with_split_classes(int64_t classes, int lanes, F&& f) {
  constexpr bool kRare = kSquared || kSmoothed;
  if constexpr (kSquared) {
    if (classes <= 4) return f(std::integral_constant<int, 4>{});
  }
  if constexpr (!kRare) {
    if (classes <= lanes * 5) return f(std::integral_constant<int, 5>{});
  }
  if (classes <= lanes * 6) return f(std::integral_constant<int, 6>{});
  if constexpr (!kRare) {
    if (classes <= lanes * 7) return f(std::integral_constant<int, 7>{});
  }
  if (classes <= lanes * 8) return f(std::integral_constant<int, 8>{});
  if constexpr (!kSquared) return f(std::integral_constant<int, kMostOfLane>{});
}
// The same where the classes of a voxel lie side by side, f(classes, turns): how many lanes take units of classes in
// turn (TileLane), so that few of a warp meet in a bank. Even numbers are for even numbers of classes, of which pairs
// are whole words at every voxel; of odd ones all but the last three at least are there.
template <typename F>
void with_interleaved_classes(int64_t classes, int lanes, F&& f) {
  const bool even = classes % 2 == 0;
  if (even && classes <= lanes * 6) return f(std::integral_constant<int, 6>{}, std::integral_constant<int, 1>{});
  if (even && classes <= lanes * 8) {
    if (lanes == 1) return f(std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
    return f(std::integral_constant<int, 8>{}, std::integral_constant<int, 2>{});
  }
  if (classes <= lanes * 7) return f(std::integral_constant<int, 7>{}, std::integral_constant<int, 1>{});
  if (lanes < 4) return f(std::integral_constant<int, kMostOfLane>{}, std::integral_constant<int, 1>{});
  f(std::integral_constant<int, kMostOfLane>{}, std::integral_constant<int, 4>{});
}
// Where they do not, for a target of its own for every class.
template <typename F>
void with_general_split_classes(int64_t classes, F&& f) {
  if (classes <= 2) {
    f(std::integral_constant<int, 2>{});
  } else {
    f(std::integral_constant<int, kMostOfLaneGeneral>{});
  }
}
template <typename F>
void with_dense_split_classes(int64_t classes, int lanes, F&& f) {
  if (classes <= lanes * kMostOfLaneGeneral) return with_general_split_classes(classes, f);
  f(std::integral_constant<int, kMostOfLaneDense>{});
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

// Calls f(classes, ce, squared, turns), constants, for a plan that splits the classes of a voxel and whose target is a
// label. turns: 0 where the voxels of a class lie side by side; else see with_interleaved_classes.
template <typename F>
void with_split_labels(const Volume& v, const Plan& plan, F&& f) {
  with_label_sums(v, [&](auto ce, auto squared) {
    constexpr bool kSquared = decltype(squared)::value, kSmoothed = decltype(ce)::value == CrossEntropy::kSmoothed;
    if (!plan.interleaved) {
      with_split_classes<kSquared, kSmoothed>(
          v.classes, plan.lanes, [&](auto classes) { f(classes, ce, squared, std::integral_constant<int, 0>{}); });
    } else if constexpr (!kSquared && !kSmoothed) {  // for which there is no plan
      with_interleaved_classes(v.classes, plan.lanes,
                               [&](auto classes, auto turns) { f(classes, ce, squared, turns); });
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

// The kernels that a plan asks for: calls one of the launcher's few<T, kClasses, kCeForm, kSquared, kInterleaved>(),
// split<T, kClasses, kCeForm, kSquared, kTurns>(), general_split<T, kClasses, kCrossEntropy>(), dense_split (the same),
// channel<T, kActivation, kCrossEntropy>(), general (the same), tiled (the same).
template <typename Launcher>
void with_kernel(const Volume& v, const Plan& plan, const Launcher& launcher) {
  with_logits_type(v.logits.type, [&](auto element) {
    using T = decltype(element);
    with_bool(v.cross_entropy != CrossEntropy::kNone, [&](auto has_cross_entropy) {
      constexpr bool kCrossEntropy = decltype(has_cross_entropy)::value;
      if (plan.split) {
        if constexpr (sizeof(T) < 8) {
          if (plan.dense) {
            with_dense_split_classes(v.classes, plan.lanes, [&](auto classes) {
              launcher.template dense_split<T, decltype(classes)::value, kCrossEntropy>();
            });
          } else if (plan.general) {
            with_general_split_classes(v.classes, [&](auto classes) {
              launcher.template general_split<T, decltype(classes)::value, kCrossEntropy>();
            });
          } else {
            with_split_labels(v, plan, [&](auto classes, auto ce, auto squared, auto turns) {
              launcher.template split<T, decltype(classes)::value, decltype(ce)::value, decltype(squared)::value,
                                      decltype(turns)::value>();
            });
          }
        }
      } else if (plan.lanes == 1) {
        with_few_classes<T>(v.classes, [&](auto classes) {
          with_label_sums(v, [&](auto ce, auto squared) {
            with_bool(v.logits.voxel_stride != 1, [&](auto interleaved) {
              constexpr int kClasses = decltype(classes)::value;
              constexpr CrossEntropy kCeForm = decltype(ce)::value;
              constexpr bool kSquared = decltype(squared)::value, kInterleaved = decltype(interleaved)::value;
              constexpr bool kSmoothed = kCeForm == CrossEntropy::kSmoothed;
              // For the rest there is no plan.
              if constexpr ((!kSquared || kClasses == 2) && !(kSmoothed && (kInterleaved || sizeof(T) == 8))) {
                launcher.template few<T, kClasses, kCeForm, kSquared, kInterleaved>();
              }
            });
          });
        });
      } else {
        with_activation(v.activation, [&](auto activation) {
          constexpr Activation kActivation = decltype(activation)::value;
          constexpr bool kSoftmax = kActivation == Activation::kSoftmax;
          // Without an activation it is not asked for, and the tiled kernels have that of a softmax alone.
          constexpr bool kGeneral = kCrossEntropy && kActivation != Activation::kNone;
          constexpr bool kTiled = kCrossEntropy && kSoftmax;
          if (plan.by_channel) {
            if constexpr (!kSoftmax) launcher.template channel<T, kActivation, kGeneral>();
          } else if (takes_general_tiles(v)) {
            launcher.template general<T, kActivation, kGeneral>();
          } else {
            launcher.template tiled<T, kActivation, kTiled>();
          }
        });
      }
    });
  });
}

// Voxels that a thread takes at once: one 16-byte load of each class, or 8 bytes where that is many registers.
template <typename T, int kClasses, bool kCrossEntropy>
constexpr int kVoxelsOf = 16 / sizeof(T) * kClasses <= (kCrossEntropy ? 16 : 32) ? 16 / sizeof(T) : 8 / sizeof(T);

// The same where it takes one channel, and blocks of a multiprocessor there.
template <typename T>
constexpr int kChannelVoxels = sizeof(T) == 8 ? 4 : 8;
template <typename T>
constexpr int kChannelBlocks = sizeof(T) == 8 ? 2 : 3;

// Dynamic shared memory of a tiled block, in elements of A.
struct TileLayout {
  int tile_stride;  // odd, so that a column of classes falls into different banks
  int groups;       // threads that share a voxel
  int halves;       // threads that share a class
  __host__ __device__ TileLayout(int classes, int voxels, int threads)
      : tile_stride(voxels + 1), groups(threads / voxels), halves(threads >= 2 * classes ? threads / classes : 1) {}
};

}  // namespace cuda
}  // namespace tversky_kernels
