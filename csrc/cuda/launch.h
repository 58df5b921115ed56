// The launches, as the operators call them. Every launch is on the given stream; none waits.
#pragma once

#include "../common/table.h"
#include "../common/views.h"
#include "platform.h"

namespace tversky_kernels {
namespace cuda {

// The blocks of a sample (or of a channel), in groups of about as many as run at the same time. A group has
// neighbouring pieces of the volume. Its blocks step through them side by side, so that they read one place of memory
// at a time. The groups start one after another and go from one end of the volume to the other.
struct Blocks {
  int programs;  // how many: whole groups
  int group;     // blocks of each
  int piece;     // voxels that a block takes at once
  int pieces;    // of each group
  int longer;    // so many groups have one more
};

// The count pass goes through the volume from its end: there the layer that wrote the logits has stopped, and the L2
// cache holds them. The gradient pass begins where the count pass has stopped, at the beginning.
enum class Order { kForward, kBackward };

struct Family;  // families.h

// How a pass is cut up. The same for both passes and for every value of the data.
struct Plan {
  const Family* family;
  Blocks blocks;
  int voxels;        // that a thread takes at once, or where no lanes share a voxel, a block
  int lanes;         // threads that share a voxel, each with some of its classes; 0: all threads of a block
  int warps;         // over which these threads are spread
  bool interleaved;  // split_labels: the classes of a voxel lie side by side
  bool by_products;  // split_targets: dense targets of the logits' size, made of products and no powers
  int shared_bytes;  // of a block
  static constexpr int kThreads = 256;
};

// out: the gradient, for the gradient pass; null: the count pass. multiprocessors: of the device.
Plan make_plan(const Volume& volume, const GradientView* out, int multiprocessors);

// partial[sample][program][column][C] for the columns of enum Count, float (double for double logits). *finished
// becomes 0.
void launch_count_pass(const Volume& volume, const Plan& plan, void* partial, unsigned* finished, cudaStream_t stream);

struct TableArguments {
  Table table;
  const void* partial;  // as above, or null: `counts` holds the sums already
  bool partial_is_double;
  bool begins_early;   // its launch may begin while the count pass, launched right before, is still running
  bool rehearses;      // it goes through its instructions once before it waits: see table_kernel
  unsigned* finished;  // blocks that have summed their part of partial; 0
  int programs;
  double* counts;  // [N][C][columns], written from partial
  void* loss;      // null: the counts are all that is wanted
  bool loss_is_double;
  double* coefficients;  // [rows][C][2 or 4]
};
void launch_table(const TableArguments& arguments, cudaStream_t stream);

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

// How a pass with regions is cut up.
struct RegionPlan {
  Blocks blocks;
  int tile_voxels;   // of a tile in shared memory
  int copies;        // of the table of a block, for as many groups of its warps
  int shared_bytes;  // of a block
  int64_t table_size;
  int64_t tables() const { return int64_t{blocks.programs} * copies; }  // of a sample
};
RegionPlan make_region_plan(const RegionVolume& volume, bool gradient, int multiprocessors);

// tables: zeros, table_size of them for each sample and table. counts: [sample][R][C][columns + 1].
void launch_region_count_pass(const RegionVolume& volume, const RegionPlan& plan, double* tables, double* counts,
                              cudaStream_t stream);
// coefficients: [sample][R][C][2 or 4], times the upstream gradient. memory: four numbers of the computation's type for
// each of their rows.
void launch_region_gradient_pass(const RegionVolume& volume, const RegionPlan& plan, const double* coefficients,
                                 void* memory, const GradientView& out, cudaStream_t stream);

}  // namespace cuda
}  // namespace tversky_kernels
