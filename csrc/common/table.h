// The table's arguments: counts in, loss and coefficients out, on either device.
#pragma once

#include <stdint.h>

#include "mathematics.h"

namespace tversky_kernels {

struct Table {
  int64_t samples, classes;
  int64_t first_class;     // 1 where the background is left out
  int64_t rows;            // samples, or 1 where the batch is summed
  bool has_cross_entropy;  // counts [samples][classes][6] instead of 3, coefficients [rows][classes][4] instead of 2
  Reduction reduction;
  Absent absent;
  TverskyParameters tversky;
  CeParameters ce;
  double most_coefficient;  // see bounded_coefficient
  const double*
      class_parameters;  // [4][C]: alpha, beta, class weight, class weight of the cross-entropy; null: all alike

  TK_MATH int columns() const { return has_cross_entropy ? kAllCounts : kOverlapCounts; }
  TK_MATH int coefficient_columns() const { return has_cross_entropy ? kAllCoefficients : kOverlapCoefficients; }
  TK_MATH int64_t kept() const { return classes - first_class; }
  TK_MATH int64_t together() const { return rows == samples ? 1 : samples; }  // samples of a row

  TK_MATH TverskyParameters tversky_of_class(int64_t c) const {
    TverskyParameters p = tversky;
    if (class_parameters != nullptr) {
      p.alpha = class_parameters[c];
      p.beta = class_parameters[classes + c];
      p.class_weight = class_parameters[2 * classes + c];
    }
    return p;
  }
  TK_MATH double ce_class_weight(int64_t c) const {
    return class_parameters != nullptr ? class_parameters[3 * classes + c] : 1.0;
  }
};

}  // namespace tversky_kernels
