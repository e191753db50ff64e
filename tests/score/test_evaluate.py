"""Against numbers worked out by hand, and against another library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_auroc, multiclass_calibration_error

from distal.score.evaluate import calibration_error, evaluate

ALL = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")


def one_hot(predicted: list[int], n_classes: int) -> np.ndarray:
    return np.eye(n_classes, dtype=np.float32)[predicted]


def test_a_confusion_matrix_by_hand() -> None:
    """Rows are labels: [[5, 1, 0], [2, 2, 0], [0, 1, 1]]."""
    labels = np.repeat([0, 1, 2], [6, 4, 2])
    predicted = np.array([0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 2])
    values, undefined = evaluate(ALL, labels, predicted, one_hot(predicted.tolist(), 3), "abc")
    assert undefined == {}
    assert values["accuracy"] == pytest.approx(8 / 12)
    assert values["balanced_accuracy"] == pytest.approx((5 / 6 + 2 / 4 + 1 / 2) / 3)
    assert values["macro_f1"] == pytest.approx((10 / 13 + 4 / 8 + 2 / 3) / 3)  # 2 TP / (2 TP + FP + FN)
    # A hard decision has one point on its curve: the area is (TPR + TNR) / 2.
    areas = [(5 / 6 + 4 / 6) / 2, (2 / 4 + 6 / 8) / 2, (1 / 2 + 10 / 10) / 2]
    assert values["auroc"] == pytest.approx(np.mean(areas))
    assert values["ece"] == pytest.approx(1 - 8 / 12)  # always certain


def test_a_class_that_no_label_has(recwarn: pytest.WarningsRecorder) -> None:
    """It is in no macro mean, and predicting it is an error. Rows are labels: [[1, 0, 1, 0], [0, 2, 0, 0]]."""
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    values, undefined = evaluate(ALL, labels, predicted, one_hot(predicted.tolist(), 4), ["w", "x", "y", "z"])
    assert values["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert values["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["auroc"] is None
    assert undefined == {"auroc": "no image has the label 'y' and 1 more, and a curve needs one of every class"}
    assert len(recwarn) == 0


def test_labels_of_one_class(recwarn: pytest.WarningsRecorder) -> None:
    labels, predicted = np.array([1, 1, 1, 1]), np.array([1, 0, 0, 1])
    values, undefined = evaluate(ALL, labels, predicted, one_hot(predicted.tolist(), 2), ["x", "y"])
    assert values["accuracy"] == values["balanced_accuracy"] == 0.5
    assert values["macro_f1"] == pytest.approx(2 / 3)
    assert (values["auroc"], set(undefined)) == (None, {"auroc"})
    assert "no image has the label 'x'," in undefined["auroc"]
    assert len(recwarn) == 0


def test_auroc_counts_the_pairs_that_are_in_order() -> None:
    """Of the 2 x 3 pairs of a label 1 and a label 0 five are in order, and one is a tie."""
    score = np.array([0.2, 0.6, 0.6, 0.7, 0.1], np.float32)
    labels = np.array([0, 0, 1, 1, 0])
    values, _ = evaluate(["auroc"], labels, (score > 0.5).astype(int), np.stack([1 - score, score], axis=1), "xy")
    assert values == {"auroc": pytest.approx(5.5 / 6)}


def test_calibration_by_hand() -> None:
    """Three bins: (4/15, 5/15], (8/15, 9/15] and (14/15, 1]; the border belongs to the bin below it."""
    confidence = np.array([0.3, 0.3, 9 / 15, 0.55, 1.0])
    right = np.array([True, False, True, True, False])
    expected = (abs(1 - 0.6) + abs(2 - 1.15) + abs(0 - 1)) / 5
    assert calibration_error(right, confidence) == pytest.approx(expected)


BORDERS = [m / 15 for m in range(1, 16)]


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from(BORDERS).flatmap(
                lambda border: st.sampled_from([border, math.nextafter(border, 0), min(1.0, math.nextafter(border, 1))])
            ),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_calibration_at_the_borders_of_bins(predictions: list[tuple[bool, float]]) -> None:
    """Against the definition: bin m is ((m - 1) / 15, m / 15], so a border belongs to the bin below it."""
    gaps = dict.fromkeys(range(1, 16), 0.0)
    for right, confidence in predictions:
        gaps[next(m for m in range(1, 16) if confidence <= m / 15)] += right - confidence
    expected = sum(map(abs, gaps.values())) / len(predictions)
    found = calibration_error(np.array([right for right, _ in predictions]), np.array([c for _, c in predictions]))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_classes", [2, 7])
def test_as_another_library_has_it(n_classes: int) -> None:
    rng = np.random.default_rng(n_classes)
    logits = rng.normal(0, 2, (500, n_classes)).astype(np.float32)
    labels = np.where(rng.random(500) < 0.5, logits.argmax(axis=1), rng.integers(0, n_classes, 500))
    probabilities = torch.from_numpy(logits).softmax(dim=1)
    values, _ = evaluate(ALL, labels, logits.argmax(axis=1), probabilities.numpy(), "abcdefg"[:n_classes])
    truth = torch.from_numpy(labels)
    assert values["ece"] == pytest.approx(
        float(multiclass_calibration_error(probabilities, truth, n_classes, n_bins=15, norm="l1")), abs=1e-6
    )
    assert values["auroc"] == pytest.approx(float(multiclass_auroc(probabilities, truth, n_classes)), abs=1e-6)
