"""Figures of a report, as matplotlib Figures: no window, no global state, usable in any thread.

They can be read without colour: lines differ in dash and marker, areas in lightness, and the
important values are written as numbers.

Shapes: N notes, C classes.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import (
    FontEntry,
    FontProperties,
    findfont,
    findSystemFonts,
    fontManager,
    get_font,
)
from matplotlib.ticker import PercentFormatter

from clinora.evaluation import wilson

BLACK = "#111111"
GREY = "#707070"
LIGHT = "#c8c8c8"
BLUE = "#1f5fa8"  # as dark as mid grey

FEW_CLASSES = 12  # with more classes, the cells of a confusion matrix are smaller
MISSING = "□"  # stands for a character that no installed font has
MISSING_NOTE = (
    f"{MISSING} replaces characters that no installed font has; try the Noto fonts.\n"
    "The classes are in the order of the report's tables."
)


def confusion_figure(confusion: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draw a confusion matrix: counts as numbers, the shares of each row as numbers and shades.

    Args:
        confusion: (C, C) notes, rows: true class, columns: predicted class; an incorrect note
            with k labels counts as 1/k in each of their rows.
        labels: Names of the C classes.
    """
    counts = np.asarray(confusion, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-9)
    few = len(labels) <= FEW_CLASSES
    side = 3.2 + (0.75 if few else 0.36) * len(labels)
    figure = Figure(figsize=(side + 1.4, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        text = _cell_text(count, share, few)
        if text:
            axes.text(
                column, row, text, ha="center", va="center", fontsize=9 if few else 7,
                color="white" if share > 0.6 else "black",
            )  # fmt: skip
    places = range(len(labels))
    slant = {"rotation": 30, "ha": "right"} if few else {"rotation": 90, "ha": "center"}
    families, missing = fonts_for(labels)
    if missing:
        figure.supxlabel(MISSING_NOTE, fontsize=8)
    names = [replace_missing(label, missing) for label in labels]
    # No parsing: a class name such as "$x$" is not a formula.
    axes.set_xticks(places, names, parse_math=False, fontfamily=families, **slant)
    axes.set_yticks(places, names, parse_math=False, fontfamily=families)
    edges = np.arange(len(labels) - 1) + 0.5
    axes.hlines(edges, -0.5, len(labels) - 0.5, color=LIGHT, linewidth=0.5)
    axes.vlines(edges, -0.5, len(labels) - 0.5, color=LIGHT, linewidth=0.5)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(
        "Confusion matrix (rows: true class, columns: predicted class)\n"
        "An incorrect note with k labels counts as 1/k in each of their rows",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    return figure


def fonts_for(texts: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return font families that together have the characters of some texts.

    matplotlib takes each character from the first of the families that has it. These are the usual
    ones, and if they are not enough, the families that have the most of the other characters.

    Returns:
        The families, and the characters that no installed font has.
    """
    families = list(matplotlib.rcParams["font.family"])
    missing = _not_in(findfont(FontProperties()), set("".join(texts)))
    if not missing:
        return families, missing
    _find_new_fonts()
    fonts = _regular_fonts()
    while missing:
        left = {family: _not_in(path, missing) for family, path in fonts.items()}
        best = min(left, key=lambda family: len(left[family]))
        if left[best] == missing:
            break
        families.append(best)
        missing = left[best]
    return families, missing


def _not_in(font: str, characters: set[str]) -> set[str]:
    """Return the characters that a font's file does not have; white space needs no glyph."""
    face = get_font(font)
    return {c for c in characters if not c.isspace() and not face.get_char_index(ord(c))}


def _find_new_fonts() -> None:
    """Tell matplotlib about the fonts that were installed after it had cached its list of fonts."""
    known = {entry.fname for entry in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        with suppress(OSError, RuntimeError, ValueError):  # some cannot be read, such as bitmaps
            fontManager.addfont(path)


def _regular_fonts() -> dict[str, str]:
    """Return the file of each installed font family, upright and as near to regular as it has."""

    def preference(entry: FontEntry) -> tuple:
        return entry.name, abs(entry.weight - 400), entry.fname

    fonts: dict[str, str] = {}
    for entry in sorted(fontManager.ttflist, key=preference):
        is_installed = Path(entry.fname).is_file()  # matplotlib's cached list may be old
        # These fonts have a placeholder for every character.
        is_last_resort = "lastresort" in entry.name.replace(" ", "").lower()
        if entry.style == "normal" and is_installed and not is_last_resort:
            fonts.setdefault(entry.name, entry.fname)
    return fonts


def replace_missing(text: str, missing: set[str]) -> str:
    """Replace the characters that no installed font has."""
    return "".join(MISSING if character in missing else character for character in text)


def _cell_text(count: float, share: float, few: bool) -> str:
    """Format a cell of a confusion matrix; with many classes, zeros and shares have no room."""
    if few:
        text = f"{count:,.1f}".removesuffix(".0")
        return f"{text}\n{share:.0%}"
    if count == 0:
        return ""
    if count < 10:
        return f"{count:.1f}".removesuffix(".0")
    return f"{count:,.0f}"


def reliability_figure(confidence: np.ndarray, correct: np.ndarray) -> Figure:
    """Draw the share correct against the confidence, in ten bins of equally many notes.

    Args:
        confidence: (N,) calibrated confidence.
        correct: (N,) whether the predicted class is one of the note's labels.
    """
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color=GREY, linestyle="--", label="perfectly calibrated")
    bins = _equal_parts(confidence, 10)
    claimed = np.array([confidence[one].mean() for one in bins])
    share = np.array([correct[one].mean() for one in bins])
    bounds = np.array([wilson(correct[one].sum(), len(one)) for one in bins]).T  # (2, bins)
    axes.errorbar(
        claimed, share, abs(bounds - share), color=BLACK, marker="o", linestyle="none", capsize=3,
        label=f"a tenth of the notes each, about {len(bins[0])}, with 95% interval",
    )  # fmt: skip
    low = max(0, min(claimed.min(), bounds.min()) - 0.05)
    axes.set(xlim=(low, 1.01), ylim=(low, 1.01), xlabel="confidence", ylabel="share correct")
    _percent(axes)
    axes.set_title("Are 90% of the predictions\nwith a confidence of 90% correct?")
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def coverage_figure(
    confidence: np.ndarray, correct: np.ndarray, threshold: float, promise: float
) -> Figure:
    """Draw the share of incorrect predictions if only the most confident notes are answered.

    Args:
        confidence: (N,) calibrated confidence.
        correct: (N,) whether the predicted class is one of the note's labels.
        threshold: The confidence below which the run refers a note to a person.
        promise: The share of the answered notes that should be correct.
    """
    order = np.argsort(-confidence, kind="stable")
    count = np.arange(1, len(order) + 1)  # number of answered notes
    coverage = count / len(order)
    risk = np.cumsum(~correct[order]) / count
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.step(coverage, risk, where="post", color=BLACK, label="share incorrect of those answered")
    target = f"target: at most {1 - promise:.0%} incorrect"
    axes.axhline(1 - promise, color=GREY, linestyle="--", label=target)
    answered = int((confidence >= threshold).sum())
    if answered:
        share = coverage[answered - 1]
        here = risk[answered - 1]
        text = f"threshold {threshold:.2f}: {share:.0%} answered, {here:.1%} incorrect"
        axes.plot(share, here, "D", color=BLUE, markersize=8, clip_on=False, label=text)
    # The first predictions may all be incorrect, which would flatten the rest: they do not count.
    top = 1.1 * max(risk[len(risk) // 10 :].max(), 1 - promise)
    axes.set(xlim=(0, 1), ylim=(0, top))
    axes.set(xlabel="share of the notes answered", ylabel="share incorrect")
    _percent(axes)
    axes.set_title("Fewer mistakes when the least confident notes\nare referred to a person")
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    return figure


def length_figure(tokens: np.ndarray, correct: np.ndarray, token_limit: int) -> Figure:
    """Draw any-label accuracy by note length: four groups of equally many notes.

    Args:
        tokens: (N,) tokens of the whole note.
        correct: (N,) whether the predicted class is one of the note's labels.
        token_limit: The most tokens of a note that were read.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    parts = _equal_parts(tokens, 4)
    for place, part in enumerate(parts):
        share = correct[part].mean()
        low, high = wilson(correct[part].sum(), len(part))
        whole = tokens[part].max() <= token_limit
        axes.bar(
            place, share, width=0.7, facecolor="white" if whole else LIGHT, edgecolor=BLACK,
            hatch=None if whole else "//",
        )  # fmt: skip
        axes.errorbar(place, share, [[share - low], [high - share]], color=BLACK, capsize=4)
        axes.text(place, 1.03, f"{share:.1%}\n{len(part)} notes", ha="center", fontsize=9)
    names = [f"{tokens[part].min():,}–{tokens[part].max():,}" for part in parts]
    axes.set_xticks(range(len(parts)), names)
    axes.set(ylim=(0, 1.16), xlabel="tokens of the note", ylabel="any-label accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title(f"Accuracy by note length (hatched: some are cut at {token_limit:,} tokens)")
    return figure


def training_figure(steps: Sequence[dict], validations: Sequence[dict]) -> Figure:
    """Draw loss and learning rate over the steps of training, and the validation loss.

    Args:
        steps: One for each step, with step, loss (nats) and learning_rate.
        validations: One for each validation, with step and validation_loss (nats).
    """
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    at = np.array([step["step"] for step in steps])
    loss = np.array([step["loss"] for step in steps])
    above.plot(at, loss, color=LIGHT, linewidth=1, label="training, each step")
    width = max(1, len(loss) // 30)
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    above.plot(at[width - 1 :], smooth, color=BLACK, label=f"training, mean of {width} steps")
    if validations:
        above.plot(
            [v["step"] for v in validations], [v["validation_loss"] for v in validations],
            color=BLUE, marker="o", linestyle="--", label="validation",
        )  # fmt: skip
    above.set_ylabel("loss (nats)")
    above.set_title("Training")
    above.legend(fontsize=8)
    below.plot(at, [s["learning_rate"] for s in steps], color=BLACK)
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    return figure


def _equal_parts(values: np.ndarray, count: int) -> list[np.ndarray]:
    """Sort N values and divide their positions into parts of equal size, none empty."""
    order = np.argsort(values, kind="stable")
    return np.array_split(order, min(count, len(order)))


def _percent(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=None))
