"""What the paper reports: DSC, sensitivity, specificity, F2 and the area under the precision-recall curve."""

from __future__ import annotations

import numpy as np
from sklearn import metrics

NAMES = ("DSC", "sensitivity", "specificity", "F2", "APR")


def scores(truth: np.ndarray, probability: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """The paper's figures of one patient, as fractions; NaN where the patient has no lesion to find.

    APR is the average precision, the estimator of the area that Boyd et al. (2013), whom the paper cites, recommend
    among others: it does not interpolate.
    """
    truth, probability = truth.ravel().astype(bool), probability.ravel()
    predicted = probability >= threshold
    (tn, fp), (_, _) = metrics.confusion_matrix(truth, predicted, labels=[False, True])
    found = truth.any()
    return {
        "DSC": metrics.f1_score(truth, predicted, zero_division=0.0) if found else np.nan,
        "sensitivity": metrics.recall_score(truth, predicted, zero_division=0.0) if found else np.nan,
        "specificity": tn / (tn + fp) if tn + fp else np.nan,
        "F2": metrics.fbeta_score(truth, predicted, beta=2, zero_division=0.0) if found else np.nan,
        "APR": metrics.average_precision_score(truth, probability) if found else np.nan,
    }
