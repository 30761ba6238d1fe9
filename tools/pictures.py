"""Make the README's pictures: LoRA drawn, and the page as a browser shows it.

    python -m tools.pictures

The second needs playwright and Debian's chromium.
"""

import argparse
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

import clinora
from clinora.checkpoint import write_atomically
from clinora.figures import BLACK, BLUE, GREY, LIGHT
from clinora.report import png


def lora_figure() -> Figure:
    """Draw h = W·x + (α/r)·B·A·x: the frozen W, beside it A down to r entries and B up again."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0.5, 10), ylim=(0, 6.2), aspect="equal")
    axes.axis("off")

    def box(corners: list[tuple[float, float]], colour: str, text: str, ink: str) -> None:
        axes.add_patch(Polygon(corners, facecolor=colour, edgecolor=BLACK))
        x, y = (sum(c) / len(corners) for c in zip(*corners, strict=True))
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


def page_picture(chromium: str) -> bytes:
    """Serve the bundled run, submit a bundled note and give what the browser shows as PNG."""
    from playwright.sync_api import expect, sync_playwright

    from clinora.serving.app import create_app, serve

    notes = clinora.read_notes("bundled").notes
    note = next(note.text for note in notes if "acute pericarditis" in note.text)
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
            page.wait_for_timeout(1000)  # until nothing moves
            shown = page.screenshot(full_page=True)
            browser.close()
    return shown


def main(argv: list[str] | None = None) -> int:
    """Make both; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write")
    args = parser.parse_args(argv)
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.exit(2, "pictures.py: no chromium on the PATH: install Debian's\n")
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "lora.png", png(lora_figure()))
    write_atomically(args.out / "page.png", page_picture(chromium))
    print(f"{args.out / 'lora.png'} and {args.out / 'page.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
