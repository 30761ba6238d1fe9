"""Figures of a report, as matplotlib Figures: no window, no global state, any thread.

They say the same in black and white and to the colour-blind: lines differ in dash and marker,
areas in lightness, and what matters stands there as a number.

Shapes: N notes, C classes.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clinora.evaluation import wilson
from clinora.explain import LayerUpdate

BLACK, GREY, LIGHT = "#111111", "#707070", "#c8c8c8"
BLUE = "#1f5fa8"  # as dark as mid grey


def confusion_figure(confusion: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draw a confusion matrix: counts as numbers, each row's shares as numbers and shades.

    Args:
        confusion: (C, C) notes filed under the one class and named the other; a wrong note under
            k classes counts as 1/k in each of their rows.
        labels: Names of the C classes.
    """
    counts = np.asarray(confusion, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-9)
    few = len(labels) <= 12  # forty classes leave room neither for zeros nor for shares
    side = 3.2 + (0.75 if few else 0.36) * len(labels)
    figure = Figure(figsize=(side + 1.4, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        text = f"{count:,.{1 if few or count < 10 else 0}f}".removesuffix(".0")
        if few or count:
            axes.text(
                column, row, f"{text}\n{share:.0%}" if few else text, ha="center", va="center",
                fontsize=9 if few else 7, color="white" if share > 0.6 else "black",
            )  # fmt: skip
    # A class may be named "$x$": that is no formula.
    names = {"labels": labels, "parse_math": False}
    axes.set_xticks(
        range(len(labels)), **names, rotation=30 if few else 90, ha="right" if few else "center"
    )
    axes.set_yticks(range(len(labels)), **names)
    edges = np.arange(len(labels) - 1) + 0.5
    axes.hlines(edges, -0.5, len(labels) - 0.5, color=LIGHT, linewidth=0.5)
    axes.vlines(edges, -0.5, len(labels) - 0.5, color=LIGHT, linewidth=0.5)
    axes.set_xlabel("named")
    axes.set_ylabel("filed under")
    axes.set_title(
        "Notes by filed and named class\n"
        "A note is right if it is filed under the class named; a wrong note\n"
        "under k classes counts as 1/k in each of their rows",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    return figure


def reliability_figure(confidence: np.ndarray, right: np.ndarray) -> Figure:
    """Draw how often answers of a confidence are right: ten bins of equally many notes.

    Args:
        confidence: (N,) calibrated.
        right: (N,) whether the note is filed under the class named.
    """
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color=GREY, linestyle="--", label="perfectly calibrated")
    parts = [p for p in np.array_split(np.argsort(confidence, kind="stable"), 10) if len(p)]
    claimed = [confidence[p].mean() for p in parts]
    share = np.array([right[p].mean() for p in parts])
    bounds = np.array([wilson(right[p].sum(), len(p)) for p in parts]).T
    axes.errorbar(
        claimed, share, abs(bounds - share), color=BLACK, marker="o", linestyle="none", capsize=3,
        label=f"a tenth of the notes each, about {len(parts[0])}, with 95% interval",
    )  # fmt: skip
    low = max(0, min(*claimed, bounds.min()) - 0.05)
    axes.set(xlim=(low, 1.01), ylim=(low, 1.01), xlabel="confidence", ylabel="share right")
    _percent(axes)
    axes.set_title("Is a confidence of 90% right nine times in ten?")
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def coverage_figure(
    confidence: np.ndarray, right: np.ndarray, threshold: float, promise: float
) -> Figure:
    """Draw risk against coverage: the share wrong if only the most confident notes are answered.

    Args:
        confidence: (N,) calibrated.
        right: (N,) whether the note is filed under the class named.
        threshold: The confidence under which the run refers a note to a person.
        promise: The share of the answered notes that should be right.
    """
    order = np.argsort(-confidence, kind="stable")
    coverage = np.arange(1, len(order) + 1) / len(order)
    risk = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.step(coverage, risk, where="post", color=BLACK, label="share wrong of those answered")
    axes.axhline(1 - promise, color=GREY, linestyle="--", label=f"promised: {1 - promise:.0%}")
    answered = (confidence >= threshold).mean()
    if answered:
        here = risk[round(answered * len(order)) - 1]
        text = f"threshold {threshold:.2f}: {answered:.0%} answered, {here:.1%} wrong"
        axes.plot(answered, here, "D", color=BLUE, markersize=8, clip_on=False, label=text)
    # The first few answers may all be wrong: they would flatten the rest.
    top = 1.1 * max(*risk[len(risk) // 10 :], 1 - promise)
    axes.set(xlim=(0, 1), ylim=(0, top), xlabel="share of the notes answered", ylabel="share wrong")
    _percent(axes)
    axes.set_title("What referring the least confident notes to a person buys")
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    return figure


def length_figure(tokens: np.ndarray, right: np.ndarray, token_limit: int) -> Figure:
    """Draw any-label accuracy by note length: four groups of equally many notes.

    Args:
        tokens: (N,) tokens of the whole note.
        right: (N,) whether the note is filed under the class named.
        token_limit: How many tokens of a note were read.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    parts = [p for p in np.array_split(np.argsort(tokens, kind="stable"), 4) if len(p)]
    for place, part in enumerate(parts):
        share = right[part].mean()
        low, high = wilson(right[part].sum(), len(part))
        whole = tokens[part].max() <= token_limit
        axes.bar(
            place, share, width=0.7, facecolor="white" if whole else LIGHT, edgecolor=BLACK,
            hatch=None if whole else "//",
        )  # fmt: skip
        axes.errorbar(place, share, [[share - low], [high - share]], color=BLACK, capsize=4)
        axes.text(place, 1.03, f"{share:.1%}\n{len(part)} notes", ha="center", fontsize=9)
    names = [f"{tokens[p].min():,}–{tokens[p].max():,}" for p in parts]
    axes.set_xticks(range(len(parts)), names)
    axes.set(ylim=(0, 1.16), xlabel="tokens of the note", ylabel="any-label accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title(f"Accuracy by note length (hatched: some are cut at {token_limit:,} tokens)")
    return figure


def training_figure(steps: Sequence[dict], validations: Sequence[dict]) -> Figure:
    """Draw loss and learning rate over the steps of training, and the validation loss.

    Args:
        steps: Of each step: step, loss (nats), learning_rate.
        validations: Of each validation: step, validation_loss (nats).
    """
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    at, loss = np.array([s["step"] for s in steps]), np.array([s["loss"] for s in steps])
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


def _percent(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=None))


def updates_figure(updates: Sequence[LayerUpdate]) -> Figure:
    """Draw how far an adapter moved each weight: ‖ΔW‖ / ‖W‖ by layer and target."""
    names = [_layer_and_target(update.name) for update in updates]
    layers = sorted({layer for layer, _ in names})
    targets = list(dict.fromkeys(target for _, target in names))
    shares = np.full((len(layers), len(targets)), np.nan)
    for (layer, target), update in zip(names, updates, strict=True):
        shares[layers.index(layer), targets.index(target)] = update.share
    size = max(4.6, 1.3 + 0.85 * len(targets)), max(3.4, 1.2 + 0.32 * len(layers))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.subplots()
    most = np.nanmax(shares)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=most or 1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            axes.text(
                column, row, f"{share:.1%}", ha="center", va="center", fontsize=8,
                color="white" if share > 0.6 * most else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(targets)), targets)
    axes.set_yticks(range(len(layers)), layers)
    axes.set(xlabel="adapted weight W", ylabel="layer")
    axes.set_title(
        "How far each weight was moved:\n‖(α/r)·B·A‖ / ‖W‖, Frobenius norms", fontsize=11
    )
    return figure


def singular_values_figure(updates: Sequence[LayerUpdate]) -> Figure:
    """Draw the singular values of each layer's update, and its effective rank."""
    figure = Figure(figsize=(4.6, 3.4), dpi=200, layout="constrained")
    axes = figure.subplots()
    targets = list(dict.fromkeys(_layer_and_target(update.name)[1] for update in updates))
    for update in updates:
        kind = targets.index(_layer_and_target(update.name)[1])
        axes.plot(
            range(1, len(update.singular_values) + 1), update.singular_values,
            linewidth=1, markersize=3, **_style(kind),
        )  # fmt: skip
    for kind, target in enumerate(targets):
        ranks = [u.effective_rank for u in updates if _layer_and_target(u.name)[1] == target]
        axes.plot(
            [], [], **_style(kind),
            label=f"{target}: effective rank {min(ranks):.1f} to {max(ranks):.1f}",
        )  # fmt: skip
    axes.set(xlabel="number of the singular value, of r", ylabel="singular value", ylim=(0, None))
    axes.set_title("Singular values of (α/r)·B·A:\na line for each layer", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return figure


def _layer_and_target(name: str) -> tuple[int, str]:
    """Give the layer's number, the last in the name, and the name's last segment."""
    parts = name.split(".")
    return next((int(part) for part in reversed(parts) if part.isdigit()), 0), parts[-1]


def _style(kind: int) -> dict:
    """Give one of twelve styles of a line."""
    return {
        "color": (BLUE, BLACK, GREY)[kind % 3],
        "linestyle": ("-", "--", ":")[kind % 3],
        "marker": "os^D"[kind // 3 % 4],
    }
