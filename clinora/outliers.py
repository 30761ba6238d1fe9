"""Out-of-distribution detection: is a text unlike an English clinical note?

The detector, a linear probe (Alain & Bengio 2016), reads the states of the bundled base, a language
model of English medical text, whatever base a run has. It was fitted once, with notes against other
texts (outlier exposure, Hendrycks et al. 2019), by ``tools/fit_outliers.py``. A run stores only the
limit below which its own notes hardly ever score.

Shapes: N texts, B batch, T tokens, D width.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clinora.checkpoint import BUNDLED, find_tokenizer, load_model, read_json
from clinora.tokenizer import Tokenizer

TOKENS = 64  # of a text that are read; more hardly change the decision, and take time
FALSE_ALARMS = 0.01  # share of a run's notes that may score below its limit
FEWEST_NOTES = 50  # fewer are too few to choose a limit
PROBE = BUNDLED / "outliers.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierLimit:
    """The score below which a text is unlike the notes of a run.

    Attributes:
        limit: The score.
        notes: How many notes of the run it was chosen on.
        false_alarms: The share of these notes that score below it.

    Raises:
        ValueError: The limit is not a finite number.
    """

    limit: float
    notes: int
    false_alarms: float

    def __post_init__(self) -> None:
        if not isinstance(self.limit, int | float) or not math.isfinite(self.limit):
            raise ValueError(f"the limit is {self.limit!r}: expected a finite number")


def choose_limit(scores: np.ndarray) -> OutlierLimit | None:
    """Choose a run's limit: the lower of 0 and the 1% quantile of the scores of its notes.

    The detector's bias makes 0 the limit for notes of several sources. A run whose notes are unlike
    them has a lower limit, so that its own notes are not taken for outliers.

    Args:
        scores: (N,), of notes of the run.

    Returns:
        The limit; None if there are fewer than 50 notes.
    """
    if len(scores) < FEWEST_NOTES:
        return None
    limit = min(0.0, float(np.quantile(scores, FALSE_ALARMS, method="lower")))
    return OutlierLimit(limit=limit, notes=len(scores), false_alarms=float((scores < limit).mean()))


class OutlierScorer(nn.Module):
    """Scores texts with the bundled base; the higher the score, the more like a clinical note.

    score = w · (1 / (T − 1)) Σ_{t ≥ 2} h_t + b, with the last states h of the base's first 64
    tokens, of which the first, bos, is the same for all texts. It is the detector's log-odds.

    Attributes:
        tokenizer: The bundled base's tokenizer.
        weight: w, (D,) float32.
        bias: b.

    Args:
        device: Where the model is.
        dtype: Dtype of its weights.

    Raises:
        CheckpointError: A file of the bundled base or of the detector is missing or damaged.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(find_tokenizer("bundled"))
        self.model = load_model("bundled", dtype=dtype, device=device).model
        self.requires_grad_(False)
        self.eval()
        values = read_json(PROBE)
        self.weight = torch.tensor(values["weight"], device=device)
        self.bias: float = values["bias"]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise clean texts: at most ``TOKENS`` ids of each."""
        return [self.tokenizer.encode(text, TOKENS) for text in texts]

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Score texts: ids (B, T) padded on the right, lengths (B,) → (B,) float32."""
        # Not a matrix product, which autocast would compute in bfloat16.
        return (self.features(ids, lengths) * self.weight).sum(-1) + self.bias

    def features(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Give the mean state of each text, bos left out: (B, T), (B,) → (B, D) float32."""
        states = self.model(ids).float()  # (B, T, D)
        positions = torch.arange(ids.size(1), device=ids.device)
        counts = (positions >= 1) & (positions < lengths[:, None])  # (B, T)
        sums = (states * counts[..., None]).sum(1)  # (B, D)
        return sums / (lengths - 1).clamp(min=1)[:, None]


@functools.cache
def load_scorer(device: torch.device, dtype: torch.dtype) -> OutlierScorer:
    """Load the scorer when it is first needed; all runs on a device share it."""
    return OutlierScorer(device, dtype)
