"""Figures that show LoRA at work, as matplotlib Figures: matrices, training, ranks and attention.

Heat maps are blue below zero, white at zero and red above it.

Shapes: T tokens, r rank, in and out the widths of an adapted layer.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clinora.explain import LayerUpdate
from clinora.figures import BLACK, BLUE, GREY, fonts_for, replace_missing

SIGNED = "RdBu_r"  # can also be told apart with red-green colour blindness
NAME_CHARACTERS = 18  # in a line of a class name beside its bars; a name has at most two lines
PHONE_WIDTH = 4.6  # inches; wider figures have letters that are too small on a phone


def updates_figure(updates: Sequence[LayerUpdate]) -> Figure:
    """Draw how much an adapter changed each weight: ‖ΔW‖ / ‖W‖ by layer and target."""
    names = [_layer_and_target(update.name) for update in updates]
    layers = sorted({layer for layer, _ in names})
    targets = list(dict.fromkeys(target for _, target in names))
    shares = np.full((len(layers), len(targets)), np.nan)
    for (layer, target), update in zip(names, updates, strict=True):
        shares[layers.index(layer), targets.index(target)] = update.share
    width = max(4.6, 1.3 + 0.85 * len(targets))
    height = max(3.4, 1.2 + 0.32 * len(layers))
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
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
    axes.set_title("How much each weight was changed:\n‖ΔW‖ / ‖W‖, Frobenius norms", fontsize=11)
    return figure


def singular_values_figure(updates: Sequence[LayerUpdate]) -> Figure:
    """Draw the singular values of each layer's update, and the effective ranks of each target."""
    figure = Figure(figsize=(4.6, 3.4), dpi=200, layout="constrained")
    axes = figure.subplots()
    of_target: dict[str, list[LayerUpdate]] = {}
    for update in updates:
        _, target = _layer_and_target(update.name)
        of_target.setdefault(target, []).append(update)
    styles = {target: _style(number) for number, target in enumerate(of_target)}
    for update in updates:
        _, target = _layer_and_target(update.name)
        number = range(1, len(update.singular_values) + 1)
        axes.plot(number, update.singular_values, linewidth=1, markersize=3, **styles[target])
    for target, group in of_target.items():
        ranks = [update.effective_rank for update in group]
        label = f"{target}: effective rank {min(ranks):.1f} to {max(ranks):.1f}"
        axes.plot([], [], label=label, **styles[target])
    axes.set(xlabel="index of the singular value", ylabel="singular value", ylim=(0, None))
    axes.set_title("Singular values of ΔW:\na line for each layer", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return figure


def steps_figure(
    losses: Sequence[float], norms: Mapping[str, Sequence[float]], steps: int
) -> Figure:
    """Draw a training step by step: the loss, and ‖s·B·A‖ of each adapted layer.

    Args:
        losses: The loss of each finished step (nats).
        norms: For each layer by its name, the norm after 0, 1, … steps.
        steps: The number of steps at the end, which the axes have room for.
    """
    figure = Figure(figsize=(PHONE_WIDTH, 5.2))
    figure.subplots_adjust(left=0.13, right=0.97, top=0.94, bottom=0.1, hspace=0.42)
    above, below = figure.subplots(2)
    above.plot(range(1, len(losses) + 1), losses, color=BLACK, marker="o", markersize=4)
    above.set(xlim=(0, steps + 0.5), ylim=(0, max([2, *losses]) * 1.1), ylabel="loss (nats)")
    above.set_title("Loss of each step's notes", fontsize=11)
    styles = {}
    for name, values in norms.items():
        _, target = _layer_and_target(name)
        if target not in styles:
            styles[target] = _style(len(styles))
            below.plot([], [], label=target, **styles[target])
        below.plot(range(len(values)), values, linewidth=1, markersize=3, **styles[target])
    largest = max(max(values) for values in norms.values())
    below.set(
        xlim=(0, steps + 0.5), ylim=(0, max(1, 1.1 * largest)), xlabel="step", ylabel="‖s·B·A‖"
    )
    below.set_title("Size of the update, a line for each layer", fontsize=11)
    below.legend(fontsize=8, loc="upper left")
    for axes in (above, below):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def factors_figure(
    matrices: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    limits: tuple[float, float, float],
) -> Figure:
    """Draw A, B and s·B·A of some layers as heat maps, a row for each layer.

    Args:
        matrices: For each layer by its name: A (r × in), B (out × r) and s·B·A (out × in).
        limits: The absolute values of A, B and s·B·A that have the full colour.
    """
    figure = Figure(figsize=(PHONE_WIDTH, 0.7 + 2.3 * len(matrices)))
    figure.subplots_adjust(left=0.13, right=0.9, top=0.94, bottom=0.07, hspace=0.42, wspace=0.32)
    rows = figure.subplots(len(matrices), 3, width_ratios=(2, 0.7, 2), squeeze=False)
    for axes_of_row, (name, group) in zip(rows, matrices.items(), strict=True):
        layer, target = _layer_and_target(name)
        titles = ("A", "B", "s·B·A")
        for axes, title, matrix, limit in zip(axes_of_row, titles, group, limits, strict=True):
            _draw_signed(axes, matrix, limit)
            axes.set_title(f"{title}  (±{limit:.2g})", fontsize=9)
        axes_of_row[0].set_ylabel(f"layer {layer}, {target}", fontsize=9)
    return figure


def matrix_figure(matrix: np.ndarray, limit: float, title: str) -> Figure:
    """Draw a matrix as a heat map; ``limit`` is the absolute value that has the full colour."""
    figure = Figure(figsize=(3.4, 3.2), dpi=150)
    figure.subplots_adjust(left=0.1, right=0.97, top=0.88, bottom=0.08)
    axes = figure.subplots()
    _draw_signed(axes, matrix, limit)
    axes.set_title(f"{title}  (±{limit:.2g})", fontsize=10)
    return figure


def full_colour(matrix: np.ndarray) -> float:
    """Choose the limit of a heat map's colours: the 99.5th percentile of the absolute values.

    The largest value would let a few outliers pale the rest. A matrix of zeros gets 1.
    """
    return float(np.quantile(np.abs(matrix), 0.995)) or 1.0


def strengths_figure(labels: Sequence[str], columns: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the probability of each class as bars, one for each strength of the adapter.

    Args:
        labels: Names of the C classes.
        columns: For each strength by its name, from the first bar to the last: C probabilities.
    """
    thickness = 0.8 / len(columns)
    height = 1.3 + 0.26 * len(columns) * len(labels)
    figure = Figure(figsize=(5.4, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    looks = (("white", None), (BLACK, None), (BLUE, "//"))
    for number, ((name, column), (colour, hatch)) in enumerate(
        zip(columns.items(), looks, strict=False)
    ):
        places = np.arange(len(labels)) + thickness * (number - (len(columns) - 1) / 2)
        bars = axes.barh(
            places, column, thickness * 0.9, label=name, facecolor=colour, edgecolor=BLACK,
            hatch=hatch,
        )  # fmt: skip
        axes.bar_label(bars, [f"{share:.1%}" for share in column], padding=3, fontsize=8)
    families, missing = fonts_for(labels)
    names = [
        textwrap.fill(
            replace_missing(label, missing), NAME_CHARACTERS, max_lines=2, placeholder="…"
        )
        for label in labels
    ]
    axes.set_yticks(range(len(labels)), names, parse_math=False, fontfamily=families)
    axes.invert_yaxis()  # the first class on top
    axes.set(xlim=(0, 1.15), xlabel="probability; the trained head stays on")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("Probabilities at three strengths of the adapter", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def ranks_figure(rows: Sequence[dict], shown: int) -> Figure:
    """Draw accuracy against rank with its intervals, and mark one rank.

    Args:
        rows: For each rank: rank, and the shares accuracy, low and high.
        shown: The position of the row to mark.
    """
    figure = Figure(figsize=(PHONE_WIDTH, 3.4), dpi=200, layout="constrained")
    axes = figure.subplots()
    accuracy = np.array([row["accuracy"] for row in rows])
    bounds = np.array([(row["low"], row["high"]) for row in rows]).T  # (2, ranks)
    places = range(len(rows))
    axes.errorbar(
        places, accuracy, abs(bounds - accuracy), color=GREY, marker="o", linestyle="none",
        capsize=3,
    )  # fmt: skip
    axes.plot(shown, accuracy[shown], "D", color=BLUE, markersize=9, zorder=3)
    axes.annotate(
        f"{accuracy[shown]:.1%}", (shown, bounds[0, shown]), xytext=(0, -6),
        textcoords="offset points", ha="center", va="top", fontsize=9,
    )  # fmt: skip
    axes.margins(x=0.1, y=0.2)
    axes.set_xticks(places, [row["rank"] for row in rows])
    axes.set(xlabel="rank r", ylabel="any-label accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Accuracy with 95% interval", fontsize=11)
    return figure


def attention_figure(weights: np.ndarray, tokens: Sequence[str], title: str) -> Figure:
    """Draw how much each token attends to itself and to those before it.

    Args:
        weights: (T, T), the rows sum to 1 if no token was left out.
        tokens: The T tokens as text.
        title: The figure's title.
    """
    side = 2.0 + 0.17 * len(tokens)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    families, missing = fonts_for(tokens)
    names = [replace_missing(token, missing) for token in tokens]
    places = range(len(names))
    # No parsing: a token such as "$x$" is not a formula.
    text = {"parse_math": False, "fontfamily": families, "fontsize": 7}
    axes.set_xticks(places, names, rotation=90, **text)
    axes.set_yticks(places, names, **text)
    axes.set(xlabel="attended token", ylabel="attending token")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.7)
    return figure


def _draw_signed(axes: Axes, matrix: np.ndarray, limit: float) -> None:
    # An entry is an area of one colour: the default mixes the colours of neighbouring entries when
    # an entry has fewer than three pixels.
    axes.imshow(
        matrix, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    rows, columns = matrix.shape
    axes.set_xticks([0, columns - 1], [1, columns], fontsize=7)
    axes.set_yticks([0, rows - 1], [1, rows], fontsize=7)


def _layer_and_target(name: str) -> tuple[int, str]:
    """Give the layer's number, which is the last number in the name, and the last segment."""
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    layer = numbers[-1] if numbers else 0
    return layer, parts[-1]


def _style(number: int) -> dict:
    """Give one of twelve styles of a line."""
    return {
        "color": (BLUE, BLACK, GREY)[number % 3],
        "linestyle": ("-", "--", ":")[number % 3],
        "marker": "os^D"[number // 3 % 4],
    }
