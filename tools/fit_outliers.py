"""Fit the detector that recognises text unlike an English clinical note.

    python -m tools.fit_outliers --data FOLDER

FOLDER has ``mtsamples.csv`` and ``mtsdialog/mtsdialog.csv`` (github.com/abachaa/MTS-Dialog). The
detector is a logistic regression on the bundled base's mean state of a text: training notes against
other texts of the kinds ``TUNED``. The bias is then moved so that at most 2% of the validation
notes of each source score below 0. The result, ``clinora/bundled/outliers.json``, has one weight
for each dimension of the base, and no words.

Shapes: N texts, D width.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import clinora
from clinora.checkpoint import write_atomically
from clinora.classifier import Classifier
from clinora.notes import clean_text, ordinary_case
from clinora.outliers import PROBE, OutlierScorer
from clinora.tables.opening import open_table
from clinora.tables.table import TableError, as_text
from tools.clinical_lists import TO_FIT, clinical_lists
from tools.other_text import other_texts

# The kinds of other text that the detector is fitted with. The others measure it.
TUNED = (
    "French", "Shopping lists", "E-mails", "Fiction", "Python code", "Numbers", "Log lines",
)  # fmt: skip
MOST = 300  # texts of a source that are used
LISTS = 120  # of each kind
FALSE_ALARMS = 0.02  # share of the validation notes of a source that may score below 0


def notes_of(data: Path, side: str) -> dict[str, list[str]]:
    """Give clinical texts of one split, by their source; at most ``MOST`` of each.

    "Beginnings" are one to three sentences of MTSamples' notes, since people also type short notes.

    Raises:
        ValueError: A file is not as expected, or has no texts of this split.
        OSError: A file cannot be read.
    """
    draw = random.Random(side)
    mtsamples = clinora.read_notes(data / "mtsamples.csv", classes="all").on(side)
    fictional = clinora.read_notes("bundled").on(side)
    dialogues, sections = read_dialogues(data / "mtsdialog" / "mtsdialog.csv", side)
    texts = [note.text for note in mtsamples]
    sources = {
        "MTSamples": texts,
        "Beginnings": [". ".join(text.split(". ")[: draw.randint(1, 3)])[:250] for text in texts],
        "Fictional notes": [note.text for note in fictional],
        "Dialogues": dialogues,
        "Sections of notes": sections,
    }
    for source, texts in sources.items():
        long_enough = sorted({text for text in texts if len(text) >= 20})
        if not long_enough:
            raise ValueError(f"{data} has no texts for {source!r} in the split {side!r}")
        sources[source] = draw.sample(long_enough, min(MOST, len(long_enough)))
    return sources


def read_dialogues(path: Path, side: str) -> tuple[list[str], list[str]]:
    """Read the dialogues of one split of MTS-Dialog, and the sections of notes on them.

    Raises:
        ValueError: The file is not a table with these columns, or a row is wrong.
        OSError: The file cannot be read.
    """
    dialogues = []
    sections = []
    try:
        with path.open("rb") as file:
            table = open_table(file, ["split", "dialogue", "section_text"])
            for number, row in enumerate(table.select(), 1):
                if row.wrong is not None:
                    raise TableError(f"is damaged: row {number} {row.wrong}")
                split, dialogue, section = [as_text(cell) for cell in row.cells]
                if split == side:
                    dialogues.append(dialogue)
                    sections.append(section)
    except TableError as error:
        raise ValueError(f"{path} {error}") from None
    return dialogues, sections


def features_of(classifier: Classifier, scorer: OutlierScorer, texts: Sequence[str]) -> np.ndarray:
    """Give the mean state of each text: (N, D) float32."""
    clean = [ordinary_case(clean_text(text)) for text in texts]
    return classifier.logits(scorer.encode(clean), scorer.features).numpy()


def fit(data: Path) -> dict:
    """Fit the detector; returns what the file holds."""
    sources = notes_of(data, "training") | clinical_lists(TO_FIT, LISTS, seed=0)
    held_out = notes_of(data, "validation") | clinical_lists(TO_FIT, LISTS, seed=1)
    other = other_texts(seed=0)
    classifier = Classifier.load("bundled", device="cpu", precision="fp32")
    scorer = OutlierScorer(torch.device("cpu"), torch.float32)
    notes = [text for texts in sources.values() for text in texts]
    outliers = [text for kind in TUNED for text in other[kind]]
    x = features_of(classifier, scorer, notes + outliers)
    is_note = np.repeat((1, 0), (len(notes), len(outliers)))
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    model.fit(scaler.transform(x), is_note)
    weight = model.coef_[0] / scaler.scale_  # of the states themselves
    lowest = []
    for source, texts in held_out.items():
        scores = features_of(classifier, scorer, texts) @ weight
        lowest.append(float(np.quantile(scores, FALSE_ALARMS, method="lower")))
        print(f"{source}: {len(texts)} validation texts, 2% score below {lowest[-1]:.3f}")
    print(f"fitted with {len(notes)} notes and {len(outliers)} other texts")
    return {"weight": [round(float(value), 6) for value in weight], "bias": round(-min(lowest), 6)}


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the notes")
    args = parser.parse_args(argv)
    try:
        probe = fit(args.data)
        write_atomically(PROBE, (json.dumps(probe) + "\n").encode())
    except (OSError, ValueError) as error:
        parser.exit(2, f"fit_outliers.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
