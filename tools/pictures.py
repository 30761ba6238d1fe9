"""Make the README's pictures: a drawing of LoRA, a chart of the results, the page in a browser.

    python -m tools.pictures

The page needs playwright and Debian's chromium.
"""

import argparse
import json
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import PercentFormatter

import clinora
from clinora.baselines import TF_IDF
from clinora.checkpoint import BUNDLED, write_atomically
from clinora.figures import BLACK, BLUE, GREY, LIGHT
from clinora.report import png

SMOLLM2_RUN = Path(__file__).parents[1] / "examples" / "smollm2-mtsamples"

# A bundled note above the threshold, so that the page shows a prediction and not a referral.
ANSWERED_NOTE = "laparoscopic cholecystectomy with intraoperative cholangiogram"


def lora_figure() -> Figure:
    """Draw h = W·x + (α/r)·B·A·x: the frozen W, and beside it A (down to r entries) and B (up)."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0.5, 10), ylim=(0, 6.2), aspect="equal")
    axes.axis("off")

    def box(corners: list[tuple[float, float]], colour: str, text: str, ink: str) -> None:
        axes.add_patch(Polygon(corners, facecolor=colour, edgecolor=BLACK))
        x = sum(corner[0] for corner in corners) / len(corners)
        y = sum(corner[1] for corner in corners) / len(corners)
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=9)

    box([(1, 1.6), (4, 1.6), (4, 4.6), (1, 4.6)], LIGHT, "W, frozen\n(out × in)", BLACK)
    box([(5, 1.6), (8, 1.6), (6.9, 2.8), (6.1, 2.8)], BLUE, "A (r × in)\nstarts random", "white")
    box([(6.1, 3.4), (6.9, 3.4), (8, 4.6), (5, 4.6)], BLUE, "B (out × r)\nstarts at 0", "white")
    axes.text(7.1, 3.1, "r entries", va="center", fontsize=9)
    _arrow(axes, (6.5, 2.8), (6.5, 3.4))
    axes.text(4.5, 0.3, "x (in)", ha="center", va="center", fontsize=10)
    axes.text(4.5, 5.9, "h = W·x + (α/r)·B·A·x", ha="center", va="center", fontsize=10)
    for middle in (2.5, 6.5):
        _arrow(axes, (4.5, 0.6), (middle, 1.6))
        _arrow(axes, (middle, 4.6), (4.5, 5.6))
    axes.text(6.0, 5.3, "· α/r", fontsize=9)
    axes.text(4.5, 5.25, "+", ha="center", va="center", fontsize=12)
    axes.text(8.1, 4.1, "A and B train", va="center", fontsize=9, color=BLUE)
    axes.text(5.8, 0.8, "dropout, in training", fontsize=9, color=GREY)
    return figure


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": BLACK})


def results_figure(
    smollm2: dict, bundled: dict, smollm2_folds: dict, bundled_folds: dict
) -> Figure:
    """Draw accuracy in folds, over test notes and over rows: two bases, TF-IDF, the best possible.

    Args:
        smollm2: The content of ``metrics.json`` of the run on SmolLM2.
        bundled: That of the bundled adapter, on the same test notes.
        smollm2_folds: The content of ``cross_validation.json`` of the run on SmolLM2.
        bundled_folds: That of the bundled adapter, on the same notes.
    """
    before = smollm2["before"]
    baselines = {baseline["name"]: baseline for baseline in smollm2["baselines"]}
    tf_idf = baselines[TF_IDF]
    folds = [
        _exactly(smollm2_folds["before"]),
        _value_and_interval(smollm2_folds["accuracy"]),
        _value_and_interval(bundled_folds["accuracy"]),
        _value_and_interval(smollm2_folds["tf_idf"]),
        _exactly(1.0),
    ]
    notes = [
        _mean_and_spread(before["any_label_accuracy"]),
        _value_and_interval(smollm2["after"]["by_note"]["accuracy"]),
        _value_and_interval(bundled["after"]["by_note"]["accuracy"]),
        _value_and_interval(tf_idf["any_label_accuracy"]),
        _exactly(1.0),
    ]
    rows = [
        _mean_and_spread(before["accuracy"]),
        _value_and_interval(smollm2["after"]["by_row"]["accuracy"]),
        _value_and_interval(bundled["after"]["by_row"]["accuracy"]),
        _value_and_interval(tf_idf["accuracy"]),
        _exactly(smollm2["test_ceiling"]),
    ]
    names = [
        f"SmolLM2, before\n({before['heads']} random heads)",
        "SmolLM2 + LoRA",
        "bundled base + LoRA",
        "TF-IDF +\nlinear model",
        "best possible",
    ]
    figure = Figure(figsize=(9.8, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    _bars(left, folds)
    _bars(middle, notes)
    _bars(right, rows)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_title(f"all {smollm2_folds['notes']:,} notes,\nin {smollm2_folds['folds']} folds")
    middle.set_title(f"the {smollm2['notes']} notes of\nthe test split")
    right.set_title(f"their {smollm2['rows']} rows,\neach with one label")
    figure.supxlabel(
        "accuracy, with 95% bootstrap intervals; before training, on the test split: ± one "
        "standard deviation",
        fontsize=9,
    )
    return figure


def read_report(run: Path, name: str) -> dict:
    """Read a file of a run's report.

    Raises:
        ValueError: It is not JSON.
        OSError: It cannot be read.
    """
    path = run / "report" / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def _exactly(share: float) -> tuple[float, float, float]:
    return share, share, share


def _mean_and_spread(measure: list[float]) -> tuple[float, float, float]:
    mean, deviation = measure
    return mean, mean - deviation, mean + deviation


def _value_and_interval(estimate: dict) -> tuple[float, float, float]:
    return estimate["value"], estimate["low"], estimate["high"]


def _bars(axes: Axes, shares: list[tuple[float, float, float]]) -> None:
    """Draw one bar for each (value, low, high), with the value as text right of the interval."""
    colours = [LIGHT, BLUE, BLUE, GREY, "white"]
    for place, (value, low, high) in enumerate(shares):
        axes.barh(place, value, height=0.65, facecolor=colours[place], edgecolor=BLACK)
        if low < high:
            interval = [[value - low], [high - value]]
            axes.errorbar(value, place, xerr=interval, color=BLACK, capsize=4)
        axes.text(high + 0.02, place, f"{value:.1%}", va="center")
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)


def page_picture(chromium: str) -> bytes:
    """Serve the bundled run, submit a bundled note and return a screenshot of the page as PNG."""
    from playwright.sync_api import expect, sync_playwright

    from clinora.serving.app import create_app, serve

    notes = clinora.read_notes("bundled").notes
    note = next(note.text for note in notes if ANSWERED_NOTE in note.text)
    classifier = clinora.Classifier.load("bundled")
    with tempfile.TemporaryDirectory() as flags, socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(classifier, flags)
        threading.Thread(target=serve, args=(app, listener), daemon=True).start()
        with sync_playwright() as play:
            options = ["--no-sandbox", "--disable-gpu"]
            browser = play.chromium.launch(executable_path=chromium, args=options)
            page = browser.new_page(viewport={"width": 1120, "height": 1330})
            page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
            page.get_by_label("Enter Clinical Note").fill(note)
            page.get_by_role("button", name="Submit").click()
            expect(page.get_by_label("Prediction in text")).not_to_have_value("", timeout=60_000)
            page.locator("#explanation .points").first.wait_for()
            page.wait_for_timeout(1000)  # until all animations have ended
            screenshot = page.screenshot(full_page=True)
            browser.close()
    return screenshot


def main(argv: list[str] | None = None) -> int:
    """Make the pictures; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    args = parser.parse_args(argv)
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.exit(2, "pictures.py: there is no chromium on the PATH: install Debian's package\n")
    try:
        write_pictures(args.out, chromium)
    except (OSError, ValueError) as error:
        parser.exit(2, f"pictures.py: {error}\n")
    except ModuleNotFoundError as error:
        parser.exit(2, f"pictures.py: {error}: install the extra dev\n")
    return 0


def write_pictures(folder: Path, chromium: str) -> None:
    """Make the pictures and write them into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results = results_figure(
        smollm2=read_report(SMOLLM2_RUN, "metrics.json"),
        bundled=read_report(BUNDLED / "adapter", "metrics.json"),
        smollm2_folds=read_report(SMOLLM2_RUN, "cross_validation.json"),
        bundled_folds=read_report(BUNDLED / "adapter", "cross_validation.json"),
    )
    pictures = {
        "lora.png": png(lora_figure()),
        "results.png": png(results),
        "page.png": page_picture(chromium),
    }
    for name, picture in pictures.items():
        write_atomically(folder / name, picture)
        print(folder / name)


if __name__ == "__main__":
    sys.exit(main())
