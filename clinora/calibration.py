"""Confidence, and when to refer a note to a person."""

import math
from dataclasses import dataclass

import numpy as np

PROMISE = 0.95  # share right of what is answered
FEWEST_VALIDATION = 50  # notes; fewer can choose neither a threshold nor the best step


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """From probabilities to the confidence that the named label is one of the note's labels.

    logit(confidence) = w₁ · logit(p₁ + p₂) + w₂ · log(p₁ / p₂) + b, with p₁ ≥ p₂ the two largest
    probabilities. A note under two classes has 1/2 for each as its target, so the largest
    probability alone would call a perfect answer unsure.

    Attributes:
        weights: w₁ and w₂.
        bias: b.
        promise: The share of the answered notes that should be right.
        threshold: The confidence below which a note is referred to a person, so that on the
            validation notes the promise held; above 1 if it never did.
        notes: How many validation notes it was fitted on.
        coverage: The share of them that was answered.
        accuracy: The share of those answered that was right; None if there were none.

    Raises:
        ValueError: A number that decides is not finite, or there are not two weights.
    """

    weights: tuple[float, float]
    bias: float
    promise: float
    threshold: float
    notes: int
    coverage: float
    accuracy: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))  # JSON has lists
        numbers = (*self.weights, self.bias, self.promise, self.threshold)
        if len(self.weights) != 2 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"a calibration has two weights and finite numbers: {numbers}")

    def confidence(self, probabilities: np.ndarray) -> np.ndarray:
        """Give the confidence in the most probable class: (N, C) → (N,)."""
        logit = calibration_features(probabilities) @ np.asarray(self.weights) + self.bias
        return 1 / (1 + np.exp(-logit))


def calibration_features(probabilities: np.ndarray) -> np.ndarray:
    """Give logit(p₁ + p₂) and log(p₁ / p₂) of each note: (N, C) → (N, 2), float64."""
    tiny = 1e-6  # beyond it float32 probabilities say nothing
    second, first = np.sort(probabilities.astype(np.float64))[:, -2:].clip(tiny).T  # (N,) each
    both = (first + second).clip(max=1 - tiny)
    return np.stack((np.log(both / (1 - both)), np.log(first / second)), 1)


def check_promise(promise: float) -> None:
    """Refuse a promise that is no share.

    Raises:
        ValueError: It is not.
    """
    if not 0 < promise < 1:
        raise ValueError(f"the promised share is {promise}: expected more than 0 and less than 1")


def fit_calibration(probabilities: np.ndarray, right: np.ndarray, promise: float) -> Calibration:
    """Fit to probabilities (N, C) and to whether the most probable class is right (N,) bool."""
    from sklearn.linear_model import LogisticRegression  # slow to import: training needs none

    features, n = calibration_features(probabilities), len(right)
    hits = int(right.sum())
    target = np.where(right, (hits + 1) / (hits + 2), 1 / (n - hits + 2))
    model = LogisticRegression(C=10.0, max_iter=1000)  # each note stands twice: right and wrong
    model.fit(
        np.concatenate((features, features)),
        np.repeat((1, 0), n),
        sample_weight=np.concatenate((target, 1 - target)),
    )
    fitted = {"weights": tuple(model.coef_[0].tolist()), "bias": float(model.intercept_[0])}
    confidence = 1 / (1 + np.exp(-(features @ model.coef_[0] + fitted["bias"])))
    order = np.argsort(-confidence, kind="stable")
    last = np.append(np.diff(confidence[order]) < 0, True)  # of equally confident notes
    kept = np.flatnonzero(last & (np.cumsum(right[order]) / np.arange(1, n + 1) >= promise))
    answered = int(kept[-1]) + 1 if len(kept) else 0
    return Calibration(
        **fitted,
        promise=promise,
        threshold=float(confidence[order[answered - 1]]) if answered else 1.1,
        notes=n,
        coverage=answered / n,
        accuracy=float(right[order[:answered]].mean()) if answered else None,
    )
