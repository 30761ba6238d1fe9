"""Figures of a report, as matplotlib Figures: no window, no global state, any thread.

They say the same in black and white: numbers stand in every cell, and only lightness varies.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure


def confusion_figure(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> Figure:
    """Draw a confusion matrix: counts as numbers, each row's shares as shades.

    Args:
        confusion: (C, C) rows filed under the one class and named the other.
        labels: Names of the C classes.
    """
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.8 + 0.75 * len(labels)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        axes.text(
            column, row, f"{count}\n{share:.0%}", ha="center", va="center", fontsize=9,
            color="white" if share > 0.6 else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("named")
    axes.set_ylabel("filed under")
    axes.set_title("Rows of the file, by filed and named class")
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    return figure
