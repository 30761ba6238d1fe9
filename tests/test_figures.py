"""Figures: what stands in them, also without colour and with odd numbers."""

import dataclasses
import itertools
import re
import warnings

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from clinora import figures
from clinora.figures import (
    confusion_figure,
    coverage_figure,
    length_figure,
    reliability_figure,
    training_figure,
)
from clinora.report import png
from tools.compare import rank_figure

CONFUSION = np.array([[3, 1], [0, 5.5]])


def words(axes):
    return [text.get_text() for text in axes.texts]


def boxes_of(axes, artists):
    """Draw a figure; give where some of it is, in the units of its axes."""
    axes.figure.draw_without_rendering()
    return [a.get_window_extent().transformed(axes.transData.inverted()) for a in artists]


def sizes(axes, texts):
    """Give the sizes of texts in the units of their axes: (texts, 2)."""
    boxes = boxes_of(axes, texts)
    return np.abs([(box.width, box.height) for box in boxes])


def lightness(colour):
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def drawn(n=200, seed=0):
    draw = np.random.default_rng(seed)
    confidence = draw.uniform(0.3, 1, n)
    return confidence, draw.random(n) < confidence


# --- confusion ------------------------------------------------------------------------------------


def test_the_confusion_says_every_count_and_share():
    axes = confusion_figure(CONFUSION, ["A", "B"]).axes[0]
    assert words(axes) == ["3\n75%", "1\n25%", "0\n0%", "5.5\n100%"]


def test_rows_are_true_classes_and_columns_predicted_ones():
    axes = confusion_figure(CONFUSION, ["A", "B"]).axes[0]
    one = next(t for t in axes.texts if t.get_text().startswith("1\n"))
    assert one.get_position() == (1, 0)  # true class A (row 0), predicted B (column 1)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert [t.get_text() for t in axes.get_yticklabels()] == ["A", "B"]


def test_large_counts_are_written_out():
    assert words(confusion_figure([[12345, 0], [0, 1]], "AB").axes[0])[0] == "12,345\n100%"


def test_a_class_without_notes_has_no_share():
    assert words(confusion_figure([[0, 0], [0, 2]], "AB").axes[0])[:2] == ["0\n0%", "0\n0%"]


@pytest.mark.parametrize("classes", [2, 5, 12, 13, 40])
def test_texts_of_a_confusion_fit_their_cells(classes):
    draw = np.random.default_rng(0)
    counts = np.diag(draw.integers(1, 2000, classes)) + 0.5
    axes = confusion_figure(counts, [f"Specialty number {i}" for i in range(classes)]).axes[0]
    assert (sizes(axes, axes.texts) < 1).all()
    assert (sizes(axes, axes.get_yticklabels())[:, 1] < 1).all()
    if classes > 12:  # the few have slanted names
        assert (sizes(axes, axes.get_xticklabels())[:, 0] < 1).all()
    assert max(axes.figure.get_size_inches()) < 24


def test_forty_classes_say_every_count_that_is_not_zero():
    counts = np.diag(np.arange(40)) + np.eye(40, k=1) / 2
    said = words(confusion_figure(counts, [f"{i}" for i in range(40)]).axes[0])
    assert sorted(map(float, said)) == sorted([*range(1, 40), *[0.5] * 39])


def test_counts_stand_out_from_their_cells():
    """White on dark, black on light, at every share."""
    for share in np.linspace(0, 1, 21):
        axes = confusion_figure([[share, 1 - share], [0, 1]], "AB").axes[0]
        cell = lightness(colormaps["Blues"](share)[:3])
        assert abs(cell - lightness(axes.texts[0].get_color())) > 0.4


@pytest.mark.parametrize("name", ["$\\frac{$", "cost $5 or $6", "a_b^c", "<b>&amp;"])
def test_a_class_name_is_no_formula(name):
    figure = confusion_figure(CONFUSION, [name, "B"])
    png(figure)
    labels = [*figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels()]
    assert [t.get_text() for t in labels] == [name, "B"] * 2
    assert not any(t.get_parse_math() for t in labels)


# --- class names in any script --------------------------------------------------------------------

SCRIPTS = ["心臓血管", "骨科", "정형외과", "جراحة", "ध्यान", "Хирургия", "Surgery", "🫀"]
# A letter that DejaVu Sans, the usual font, does not have. Of the fonts that come with matplotlib,
# STIXGeneral has it.
RARE = "ℊ"
STIX = findfont(FontProperties(family=["STIXGeneral"]))


def entries_of(*families):
    return [entry for entry in fontManager.ttflist if entry.name in families]


@pytest.fixture
def only(monkeypatch):
    """Have matplotlib list these fonts alone, and have these files be on the machine besides."""

    def list_only(entries, files=()):
        monkeypatch.setattr(fontManager, "ttflist", entries)
        monkeypatch.setattr(figures, "findSystemFonts", lambda: [str(file) for file in files])

    return list_only


def tick_labels(figure):
    axes = figure.axes[0]
    return [*axes.get_yticklabels(), *axes.get_xticklabels()]


def drawn_names(figure):
    """Draw a figure, and fail at any warning; gives the names beside its rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png(figure)
    shown = [label.get_text() for label in tick_labels(figure)]
    half = len(shown) // 2
    assert shown[:half] == shown[half:]
    return shown[:half]


def confusion_of(names):
    return confusion_figure(np.eye(len(names)), names)


def test_class_names_of_any_script_cause_no_warning_with_the_fonts_of_this_machine():
    figure = confusion_of(SCRIPTS)
    shown = drawn_names(figure)
    assert [len(name) for name in shown] == [len(name) for name in SCRIPTS]
    assert shown[5:7] == SCRIPTS[5:7]
    assert (shown == SCRIPTS) == (figure.get_supxlabel() == "")
    families = tick_labels(figure)[0].get_fontfamily()
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    for character in "".join(shown):
        assert any(font.get_char_index(ord(character)) for font in fonts)
    assert png(confusion_of(SCRIPTS)) == png(confusion_of(SCRIPTS))


def test_characters_that_no_font_has_are_replaced_and_a_note_below_says_so(only):
    only(entries_of("DejaVu Sans"))
    names = ["骨科", "Surgery 心", "جراحة"]
    assert drawn_names(confusion_of(names)) == ["□□", "Surgery □", "جراحة"]
    figure = confusion_of(names[:2])  # the narrowest one
    assert "□" in figure.get_supxlabel()
    figure.draw_without_rendering()
    (note,) = figure.texts
    box = note.get_window_extent()
    assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
    assert box.y1 <= figure.axes[0].get_tightbbox().y0


def test_usual_names_keep_the_usual_font_and_have_no_note():
    figure = confusion_of(["Cardiovascular / Pulmonary", "Chirurgie générale"])
    assert {tuple(label.get_fontfamily()) for label in tick_labels(figure)} == {("sans-serif",)}
    assert figure.get_supxlabel() == ""


def test_a_font_that_has_the_characters_is_used(only):
    only(entries_of("DejaVu Sans", "STIXGeneral"))
    figure = confusion_of([RARE, "Surgery"])
    assert drawn_names(figure) == [RARE, "Surgery"]
    assert figure.get_supxlabel() == ""
    assert all(label.get_fontfamily()[-1] == "STIXGeneral" for label in tick_labels(figure))


def test_a_font_that_was_removed_after_matplotlib_listed_them_is_not_opened(only):
    (entry,) = [entry for entry in fontManager.ttflist if entry.fname == STIX]
    removed = dataclasses.replace(entry, name="A font", fname="/removed.ttf")
    only([removed, *entries_of("DejaVu Sans")])
    assert drawn_names(confusion_of([RARE, "Surgery"])) == ["□", "Surgery"]


def test_a_font_that_was_installed_after_matplotlib_listed_them_is_used(only, tmp_path):
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    only(entries_of("DejaVu Sans"), files=[damaged, STIX])
    figure = confusion_of([RARE, "Surgery"])
    assert drawn_names(figure) == [RARE, "Surgery"]
    assert figure.get_supxlabel() == ""


def test_a_font_of_placeholders_is_not_used(only):
    entries = entries_of("DejaVu Sans", "Last Resort High-Efficiency")
    only(entries)
    assert drawn_names(confusion_of(["骨科", "Surgery"])) == ["□□", "Surgery"]


def test_the_order_in_which_fonts_are_listed_does_not_change_the_choice(only):
    entries = entries_of("DejaVu Sans", "DejaVu Math TeX Gyre", "STIXGeneral")
    chosen = []
    for order in (entries, entries[::-1]):
        only(order)
        chosen.append(tick_labels(confusion_of([RARE, "Surgery"]))[0].get_fontfamily())
    assert chosen[0] == chosen[1]


# --- confidence -----------------------------------------------------------------------------------


def test_reliability_shows_tenths_of_the_notes():
    confidence, right = drawn()
    axes = reliability_figure(confidence, right).axes[0]
    points = axes.containers[0].lines[0].get_xydata()
    order = np.argsort(confidence).reshape(10, 20)
    assert points[:, 0] == pytest.approx(confidence[order].mean(1))
    assert points[:, 1] == pytest.approx(right[order].mean(1))


def test_reliability_shows_all_of_its_points_and_intervals():
    confidence, right = drawn(60)
    axes = reliability_figure(confidence, right).axes[0]
    (segments,) = (c.get_segments() for c in axes.containers[0].lines[2])
    low, high = axes.get_ylim()
    assert all(low <= y <= high for segment in segments for y in segment[:, 1])


def test_coverage_shows_the_risk_of_each_share_answered():
    confidence, right = np.array([0.9, 0.8, 0.6, 0.4]), np.array([True, False, True, False])
    line, promise, point = coverage_figure(confidence, right, 0.6, 0.95).axes[0].lines
    assert line.get_xdata().tolist() == [0.25, 0.5, 0.75, 1]
    assert line.get_ydata() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert promise.get_ydata() == pytest.approx([0.05, 0.05])
    assert (*point.get_xdata(), *point.get_ydata()) == pytest.approx((3 / 4, 1 / 3))


def test_one_wrong_answer_of_great_confidence_does_not_flatten_the_rest():
    confidence, right = np.linspace(1, 0.5, 100), np.arange(100) > 0
    assert coverage_figure(confidence, right, 0.6, 0.95).axes[0].get_ylim()[1] < 0.2


def test_no_point_where_every_note_is_referred():
    assert len(coverage_figure(*drawn(), 1.1, 0.95).axes[0].lines) == 2


# --- lengths, training, rank ----------------------------------------------------------------------


def test_lengths_are_quarters_with_accuracy_and_number():
    tokens, right = np.array([10, 20, 30, 40, 50, 600, 700, 800]), np.arange(8) % 4 > 0
    axes = length_figure(tokens, right, 512).axes[0]
    assert words(axes) == ["50.0%\n2 notes", "100.0%\n2 notes"] * 2
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert labels == ["10–20", "30–40", "50–600", "700–800"]
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, False, True, True]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 0.9, 1.0])
def test_words_and_intervals_of_lengths_do_not_hide_each_other(share):
    axes = length_figure(np.arange(400), np.arange(400) % 100 < 100 * share, 512).axes[0]
    highest = max(box.get_segments()[0][:, 1].max() for box in axes.collections)
    boxes = boxes_of(axes, axes.texts)
    assert all(highest < box.y0 and box.y1 < axes.get_ylim()[1] for box in boxes)


@pytest.mark.parametrize("n", [1, 2, 3, 127, 192])
@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_can_be_drawn(n, right):
    """Rounding once gave an error bar of −1e-16, which matplotlib refuses."""
    n *= 4
    length_figure(np.full(n, 9), np.full(n, right), 512)
    reliability_figure(np.full(n, 0.5), np.full(n, right))
    png(coverage_figure(np.full(n, 0.5), np.full(n, right), 0.4, 0.95))


STEPS = [{"step": i, "loss": 1 / i, "learning_rate": i * 1e-3} for i in range(1, 61)]


def test_training_shows_losses_and_learning_rate():
    validations = [{"step": 30, "validation_loss": 0.7}, {"step": 60, "validation_loss": 0.5}]
    above, below = training_figure(STEPS, validations).axes
    each, mean, validation = above.lines
    assert each.get_xydata().tolist() == [[s["step"], s["loss"]] for s in STEPS]
    assert mean.get_xydata()[0] == pytest.approx([2, (1 + 1 / 2) / 2])  # of two steps
    assert validation.get_xydata().tolist() == [[30, 0.7], [60, 0.5]]
    assert below.lines[0].get_ydata() == pytest.approx([s["learning_rate"] for s in STEPS])


def test_training_of_one_step_without_validation_can_be_drawn():
    png(training_figure(STEPS[:1], []))


def points():
    ways = [("head", "head only", 640), ("lora", "rank 1", 3000), ("lora", "rank 8", 20000),
            ("full", "all", 1_200_000)]  # fmt: skip
    return [
        {"tune": t, "name": n, "trainable": k, "any_label_accuracy": 0.9, "low": 0.85, "high": 0.92}
        for t, n, k in ways
    ]


def test_rank_names_each_way_and_shows_its_interval():
    axes = rank_figure(points()).axes[0]
    assert words(axes) == [p["name"] for p in points()]
    assert axes.get_xscale() == "log"
    for container in axes.containers:
        for segment in container.lines[2][0].get_segments():
            assert segment[:, 1] == pytest.approx([0.85, 0.92])


def test_the_legend_of_ranks_hides_nothing():
    """Inside the axes it lay on the name and the interval of full fine-tuning."""
    figure = rank_figure(points())
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_tightbbox())


def test_a_threshold_without_a_wrong_answer_is_not_cut_by_the_axis():
    figure = coverage_figure(np.linspace(1, 0.5, 9), np.arange(9) < 6, 0.7, 0.95)
    *_, point = figure.axes[0].lines
    assert point.get_ydata() == [0]
    assert not point.get_clip_on()


def test_lines_and_points_differ_without_colour():
    """By dash, marker, filling or at least two fifths of lightness."""
    figures = [
        reliability_figure(*drawn()),
        coverage_figure(*drawn(), 0.6, 0.95),
        training_figure(STEPS, [{"step": 30, "validation_loss": 0.7}]),
        rank_figure(points()),
    ]
    for figure in figures:
        shown = figure.axes[0].get_legend_handles_labels()[0]
        lines = [getattr(handle, "lines", (handle,))[0] for handle in shown]
        for a, b in itertools.combinations(lines, 2):
            differ = [
                a.get_linestyle() != b.get_linestyle(),
                a.get_marker() != b.get_marker(),
                abs(lightness(a.get_color()) - lightness(b.get_color())) > 0.4,
            ]
            assert any(differ)


@pytest.mark.parametrize(
    "figure",
    [
        confusion_figure(CONFUSION, "AB"),
        reliability_figure(*drawn()),
        coverage_figure(*drawn(), 0.6, 0.95),
        length_figure(np.arange(200), drawn()[1], 100),
        training_figure(STEPS, []),
        rank_figure(points()),
    ],
    ids=["confusion", "reliability", "coverage", "length", "training", "rank"],
)
def test_every_axis_says_what_it_is(figure):
    *_, last = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    assert last.get_xlabel()
    for axes in figure.axes:
        assert axes.get_ylabel()
    assert re.search(r"\w", figure.axes[0].get_title())
