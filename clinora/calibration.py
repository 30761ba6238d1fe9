"""Confidence: the calibrated probability that a prediction is correct, and when to refer a note.

Shapes: N notes, C classes.
"""

import math
from dataclasses import dataclass

import numpy as np

PROMISE = 0.95  # share of the answered notes that should be correct
FEWEST_VALIDATION = 50  # notes; fewer are too few to choose a threshold or the best step
NEVER = 1.1  # a threshold above every confidence: every note is referred
TINY = 1e-6  # in float32, a smaller difference from 0 or 1 is only rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Turns probabilities into the confidence that the predicted class is one of the note's labels.

    logit(confidence) = w₁ · logit(p₁ + p₂) + w₂ · log(p₁ / p₂) + b, with p₁ ≥ p₂ the two largest
    probabilities. A note with two labels has the target 1/2 for each, so the largest probability
    alone would make a perfect prediction look unsure.

    Attributes:
        weights: w₁ and w₂.
        bias: b.
        promise: The share of the answered notes that should be correct.
        threshold: The confidence below which a note is referred to a person: the lowest at which
            the promise was kept on the validation notes; above 1 if it never was.
        notes: How many validation notes it was fitted on.
        coverage: The share of the validation notes that was answered.
        accuracy: The share of the answered notes that was correct; None if none was answered.

    Raises:
        ValueError: A weight, the bias, the promise or the threshold is not finite, or there are
            not two weights.
    """

    weights: tuple[float, float]
    bias: float
    promise: float
    threshold: float
    notes: int
    coverage: float
    accuracy: float | None

    def __post_init__(self) -> None:
        # From JSON the weights come as a list; a frozen dataclass can only be changed this way.
        object.__setattr__(self, "weights", tuple(self.weights))
        numbers = (*self.weights, self.bias, self.promise, self.threshold)
        if len(self.weights) != 2 or not all(math.isfinite(number) for number in numbers):
            raise ValueError(
                f"the weights, bias, promise and threshold are {numbers}: expected two weights, "
                "and only finite numbers"
            )

    def confidence(self, probabilities: np.ndarray) -> np.ndarray:
        """Give the confidence in the most probable class: (N, C) → (N,)."""
        return _confidence(calibration_features(probabilities), self.weights, self.bias)


def calibration_features(probabilities: np.ndarray) -> np.ndarray:
    """Give logit(p₁ + p₂) and log(p₁ / p₂) of each note: (N, C) → (N, 2), float64."""
    ordered = np.sort(probabilities.astype(np.float64)).clip(TINY)
    first = ordered[:, -1]  # (N,)
    second = ordered[:, -2]
    both = (first + second).clip(max=1 - TINY)
    return np.stack((np.log(both / (1 - both)), np.log(first / second)), 1)


def _confidence(features: np.ndarray, weights: tuple[float, float], bias: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(features @ np.asarray(weights) + bias)))


def check_promise(promise: float) -> None:
    """Check that a promised share is between 0 and 1.

    Raises:
        ValueError: It is not.
    """
    if not 0 < promise < 1:
        raise ValueError(f"the promised share is {promise}: expected more than 0 and less than 1")


def fit_calibration(probabilities: np.ndarray, correct: np.ndarray, promise: float) -> Calibration:
    """Fit a calibration to validation notes.

    This is a logistic regression with smoothed targets (Platt 1999, section 2.2), so it also works
    if every prediction is correct. The threshold is the lowest confidence at which the promise is
    kept.

    Args:
        probabilities: (N, C), of each class.
        correct: (N,) bool, whether the most probable class is one of the note's labels.
        promise: The share of the answered notes that should be correct.
    """
    # scikit-learn takes a second to import, and prediction does not need it.
    from sklearn.linear_model import LogisticRegression

    features = calibration_features(probabilities)
    notes = len(correct)
    hits = int(correct.sum())
    misses = notes - hits
    target = np.where(correct, (hits + 1) / (hits + 2), 1 / (misses + 2))
    # scikit-learn takes no soft targets: each note counts twice, as correct and as incorrect,
    # weighted by its target.
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(
        np.concatenate((features, features)),
        np.repeat((1, 0), notes),
        sample_weight=np.concatenate((target, 1 - target)),
    )
    first, second = model.coef_[0].tolist()
    weights = (first, second)
    bias = float(model.intercept_[0])
    confidence = _confidence(features, weights, bias)
    threshold = _lowest_threshold(confidence, correct, promise)
    answered = confidence >= threshold
    accuracy = float(correct[answered].mean()) if answered.any() else None
    return Calibration(
        weights=weights,
        bias=bias,
        promise=promise,
        threshold=threshold,
        notes=notes,
        coverage=float(answered.mean()),
        accuracy=accuracy,
    )


def _lowest_threshold(confidence: np.ndarray, correct: np.ndarray, promise: float) -> float:
    """Give the lowest confidence at which the promise is kept; ``NEVER`` if there is none."""
    order = np.argsort(-confidence, kind="stable")  # the most confident note first
    ordered = confidence[order]
    answered = np.arange(1, len(order) + 1)
    accuracy = np.cumsum(correct[order]) / answered
    # Equally confident notes are answered together: only the last of them can be the threshold.
    is_last = np.append(np.diff(ordered) < 0, True)
    kept = ordered[is_last & (accuracy >= promise)]
    if len(kept) == 0:
        return NEVER
    return float(kept[-1])
