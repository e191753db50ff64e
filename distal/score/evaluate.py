"""How good predictions are, in one number each: pure NumPy and scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distal.config import Metric

_N_BINS = 15


class _Undefined(ValueError):
    """A metric has no value for these labels; the message says why."""


def evaluate(
    metrics: Sequence[Metric],
    labels: NDArray[np.int64],
    predicted: NDArray[np.integer[Any]],
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
) -> tuple[dict[Metric, float | None], dict[Metric, str]]:
    """Compute some metrics.

    - `accuracy`: the share that is right.
    - `balanced_accuracy`: the mean recall, and `macro_f1`: the mean F1, over the classes that `labels` have; one that
      is only predicted is in neither mean.
    - `auroc`: the mean over all classes of the area under the ROC curve of one class against the rest. A class that is
      not among the labels has none, and then the mean is not defined.
    - `ece`: see `calibration_error`.

    Args:
        labels: (n,) the true classes, n >= 1.
        predicted: (n,) the most probable classes.
        probabilities: (n, C) float32, of each class.
        classes: the C names.

    Returns:
        Each metric with its value in [0, 1], None where it is not defined; and why those are not.
    """
    values: dict[Metric, float | None] = {}
    undefined: dict[Metric, str] = {}
    for metric in metrics:
        try:
            values[metric] = _value(metric, labels, predicted, probabilities, classes)
        except _Undefined as reason:
            values[metric], undefined[metric] = None, str(reason)
    return values, undefined


def _value(
    metric: Metric,
    labels: NDArray[np.int64],
    predicted: NDArray[np.integer[Any]],
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
) -> float:
    from sklearn import metrics as sk  # takes a second, and most commands do without

    present = np.unique(labels)
    if metric == "accuracy":
        return float(sk.accuracy_score(labels, predicted))
    if metric == "balanced_accuracy":  # sk.balanced_accuracy_score is the same and warns of a class only predicted
        return float(sk.recall_score(labels, predicted, labels=present, average="macro"))
    if metric == "macro_f1":
        return float(sk.f1_score(labels, predicted, labels=present, average="macro"))
    if metric == "auroc":
        absent = [name for index, name in enumerate(classes) if index not in present]
        if absent:
            others = "" if len(absent) == 1 else f" and {len(absent) - 1} more"
            raise _Undefined(f"no image has the label {absent[0]!r}{others}, and a curve needs one of every class")
        return float(np.mean([sk.roc_auc_score(labels == c, probabilities[:, c]) for c in present]))
    confidence = probabilities[np.arange(len(labels)), predicted]
    return calibration_error(labels == predicted, confidence)


def calibration_error(right: NDArray[np.bool_], confidence: NDArray[np.floating[Any]]) -> float:
    """The expected calibration error: by how much confidence and accuracy differ, bin by bin.

    Predictions are put into 15 bins of equal width by their confidence, bin m = ((m - 1) / 15, m / 15], and

        ECE = sum over the bins of n_m / n * |accuracy of the bin - mean confidence of the bin|

    (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599, section 2).

    Args:
        right: (n,) whether each prediction is right.
        confidence: (n,) in (0, 1], the probability of the predicted class.

    Returns:
        In [0, 1]; 0 is perfectly calibrated.
    """
    bins = np.digitize(confidence, np.arange(1, _N_BINS) / _N_BINS, right=True)
    gaps = np.bincount(bins, weights=right - confidence.astype(np.float64))  # n_m * (accuracy - confidence)
    return float(np.abs(gaps).sum() / len(right))
