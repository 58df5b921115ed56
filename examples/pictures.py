"""The paper's figures for a run: precision-recall curves, and slices with truth and prediction drawn on them."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from sklearn import metrics

TRUTH, PREDICTION = "#2ca02c", "#d62728"


def precision_recall(cases: list[tuple[str, np.ndarray, np.ndarray]], path: pathlib.Path) -> pathlib.Path:
    """One curve a patient and one of all voxels pooled; cases are (patient, truth, probability)."""
    figure, axes = plt.subplots(figsize=(5.5, 5.6), layout="constrained")
    pooled = (
        "all, pooled",
        np.concatenate([t.ravel() for _, t, _ in cases]),
        np.concatenate([p.ravel() for *_, p in cases]),
    )
    for patient, truth, probability in [*cases, pooled]:
        if not truth.any():
            continue
        precision, recall, _ = metrics.precision_recall_curve(truth.ravel(), probability.ravel())
        area = metrics.average_precision_score(truth.ravel(), probability.ravel())
        bold = {"color": "black", "linewidth": 2} if patient == pooled[0] else {"linewidth": 1}
        axes.step(recall, precision, where="post", label=f"{patient} (APR {100 * area:.1f} %)", **bold)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title("Held-out patients")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def slices(
    patient: str, image: np.ndarray, truth: np.ndarray, probability: np.ndarray, dsc: float, path: pathlib.Path
) -> pathlib.Path:
    """The axial slice with the most lesion, and the coronal and sagittal ones through its middle."""
    at = [int(truth.sum(tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3)]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    for axis, name in enumerate(("axial", "coronal", "sagittal")):
        picture, wanted, found = (np.take(x, at[axis], axis) for x in (image, truth, probability))
        origin = "upper" if axis == 0 else "lower"  # rows are z in the other two, and z points up
        axes[axis].imshow(picture, cmap="gray", origin=origin, interpolation="nearest")
        for x, level, colour in ((wanted, 0.5, TRUTH), (found, 0.5, PREDICTION)):
            if x.min() < level <= x.max():
                axes[axis].contour(x, levels=[level], colors=colour, linewidths=1.5)
        axes[axis].set_title(f"{name}, slice {at[axis]}", fontsize=9)
        axes[axis].axis("off")
    handles = [plt.Line2D([], [], color=c, label=n) for c, n in ((TRUTH, "truth"), (PREDICTION, "prediction"))]
    figure.legend(handles=handles, loc="lower center", ncols=2, fontsize=9)
    figure.suptitle(f"{patient}: held out, DSC {100 * dsc:.1f} %")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
