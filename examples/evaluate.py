"""What the paper reports: DSC, sensitivity, specificity, F2 and the area under the precision-recall curve; and lesions.

The area (APR) is the average precision: the sum of precision over the steps of recall, one of the estimators that Boyd
et al. (2013), whom the paper cites, recommend. Trapezoids between a few thresholds are wrong: precision is not linear
in recall between them, and the straight line lies above the curve.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from sklearn import metrics

import tversky_kernels as tk

NAMES = ("DSC", "sensitivity", "specificity", "F2", "APR")
LESION_NAMES = ("lesion_sensitivity", "false_lesions")
#: Probabilities at which a precision-recall curve is kept: even steps of log(p / (1 - p)), 0.5 in the middle.
THRESHOLDS = 1 / (1 + np.exp(-np.linspace(-10, 10, 41)))
#: Voxels that touch by a face, an edge or a corner are one lesion.
CONNECTIVITY = np.ones((3, 3, 3), bool)


def scores(truth: np.ndarray, probability: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """The paper's figures of one patient, as fractions; NaN where the patient has no lesion to find."""
    truth, probability = truth.ravel().astype(bool), np.ascontiguousarray(probability, float).ravel()
    label, channel = torch.from_numpy(truth)[None], torch.from_numpy(probability)[None, None]
    counts = tk.hard_counts(channel, label, activation="none", threshold=threshold)
    found = truth.any()
    return {
        "DSC": tk.metrics.dice(counts).item() if found else np.nan,
        "sensitivity": tk.metrics.sensitivity(counts).item(),
        "specificity": tk.metrics.specificity(counts).item(),
        "F2": tk.metrics.f_beta(counts, 2).item() if found else np.nan,
        "APR": metrics.average_precision_score(truth, probability) if found else np.nan,
    }


def lesion_scores(truth: np.ndarray, probability: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """The share of lesions of which at least one voxel was found, and the number of predicted ones that touch none."""
    truth, predicted = truth.astype(bool), probability >= threshold
    lesions, count = ndimage.label(truth, CONNECTIVITY)
    islands, predicted_count = ndimage.label(predicted, CONNECTIVITY)
    found = len(np.unique(lesions[predicted & truth]))
    touching = len(np.unique(islands[predicted & truth]))
    return {
        "lesion_sensitivity": found / count if count else np.nan,
        "false_lesions": predicted_count - touching,
    }


def curve(truth: np.ndarray, probability: np.ndarray) -> dict[str, list[int]]:
    """True and false positives at each of `THRESHOLDS`, and the number of lesion voxels: curves of patients add up."""
    truth, probability = truth.ravel().astype(bool), probability.ravel()
    at = np.digitize(probability, THRESHOLDS)  # so many thresholds are not above it

    def reached(values: np.ndarray) -> list[int]:
        return np.bincount(values, minlength=len(THRESHOLDS) + 1)[::-1].cumsum()[::-1][1:].tolist()

    return {"tp": reached(at[truth]), "fp": reached(at[~truth]), "lesion": int(truth.sum())}


def lower_trapezoid(truth: np.ndarray, score: np.ndarray) -> float:
    """The lower trapezoid of Boyd et al. (2013): from the lowest precision at a recall to the highest at the next.

    The study compares it with the average precision; they differ by less than the patients do.
    """
    precision, recall, _ = metrics.precision_recall_curve(truth.ravel(), score.ravel())
    levels = np.unique(recall)
    lowest = np.array([precision[recall == r].min() for r in levels])
    highest = np.array([precision[recall == r].max() for r in levels])
    return float(((lowest[:-1] + highest[1:]) / 2 * np.diff(levels)).sum())
