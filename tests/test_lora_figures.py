"""Figures about LoRA: what stands in them."""

import numpy as np
import pytest

from clinora.explain import LayerUpdate
from clinora.lora_figures import (
    attention_figure,
    factors_figure,
    full_colour,
    matrix_figure,
    ranks_figure,
    singular_values_figure,
    steps_figure,
    strengths_figure,
    updates_figure,
)
from clinora.report import png


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_the_figure_of_updates_shows_each_layers_share_in_its_place():
    shares = {(layer, t): 0.01 * (10 * layer + k) for layer in range(3) for k, t in enumerate("qv")}
    updates = [
        LayerUpdate(name=f"model.layers.{layer}.attn.{t}", share=share, singular_values=(1.0,),
                    effective_rank=1.0)
        for (layer, t), share in shares.items()
    ]  # fmt: skip
    (axes,) = updates_figure(updates).axes
    drawn = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert drawn == {("qv".index(t), layer): f"{s:.1%}" for (layer, t), s in shares.items()}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "v"]
    np.testing.assert_allclose(axes.images[0].get_array()[2], [0.2, 0.21])


def test_the_figure_of_singular_values_has_a_line_a_layer_and_a_style_a_target():
    updates = [
        LayerUpdate(name=f"layers.{layer}.{t}", share=0.1, singular_values=(3.0 + layer, 1.0),
                    effective_rank=1.5 + layer)
        for layer in range(2) for t in ("q", "k", "v", "o", "gate", "up", "down")
    ]  # fmt: skip
    (axes,) = singular_values_figure(updates).axes
    lines = axes.get_lines()
    assert [list(line.get_ydata()) for line in lines[:14]] == [[3, 1]] * 7 + [[4, 1]] * 7
    styles = {(li.get_color(), li.get_linestyle(), li.get_marker()) for li in lines[:7]}
    assert len(styles) == 7
    assert "q: effective rank 1.5 to 2.5" in [t.get_text() for t in axes.get_legend().texts]


def test_an_adapter_that_changed_nothing_is_drawn_too():
    update = LayerUpdate(name="layers.0.q", share=0.0, singular_values=(0.0,), effective_rank=0.0)
    (axes,) = updates_figure([update]).axes
    assert axes.texts[0].get_text() == "0.0%"


# --- the live lesson ------------------------------------------------------------------------------


def test_the_figure_of_steps_has_every_loss_and_norm_and_room_for_all_steps():
    norms = {"layers.0.q_proj": [0, 1.5, 2.5], "layers.1.v_proj": [0, 0.5, 1.0]}
    above, below = steps_figure([1.75, 1.25], norms, 20).axes
    assert above.lines[0].get_xydata().tolist() == [[1, 1.75], [2, 1.25]]
    lines = [line for line in below.lines if len(line.get_xdata())]
    assert [line.get_xydata().tolist() for line in lines] == [
        [[0, 0], [1, 1.5], [2, 2.5]], [[0, 0], [1, 0.5], [2, 1.0]]
    ]  # fmt: skip
    assert above.get_xlim() == below.get_xlim()
    assert above.get_xlim()[0] == 0 and above.get_xlim()[1] >= 20
    assert below.get_ylim()[1] >= 2.5 and above.get_ylim()[1] >= 1.75


def test_the_figure_before_the_first_step_can_be_drawn():
    figure = steps_figure([], {"layers.0.q_proj": [0.0]}, 20)
    above, below = figure.axes
    assert [len(line.get_xdata()) for line in above.get_lines()] == [0]
    (norms,) = [line for line in below.get_lines() if len(line.get_xdata()) > 0]
    assert norms.get_xydata().tolist() == [[0, 0]]
    for axes in figure.axes:
        assert axes.get_xlim()[0] <= 0 and axes.get_xlim()[1] >= 20  # room for all steps
        assert axes.get_ylim()[0] <= 0 < axes.get_ylim()[1]
    png(figure)


def test_the_figure_of_factors_shows_each_matrix_with_its_limit():
    draw = np.random.default_rng(0)
    matrices = {
        f"layers.{layer}.q": (draw.random((2, 5)), draw.random((4, 2)), draw.random((4, 5)))
        for layer in range(2)
    }
    limits = (0.5, 0.25, 0.125)
    figure = factors_figure(matrices, limits)
    shown = [axes.images[0] for axes in figure.axes]
    expected = [matrix for group in matrices.values() for matrix in group]
    for image, matrix in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(image.get_array(), matrix)
    assert [image.get_clim() for image in shown] == [(-x, x) for x in limits] * 2


# --- matrices, strengths, ranks, attention --------------------------------------------------------


def test_heat_maps_do_not_mix_the_colours_of_neighbouring_entries():
    matrix = np.eye(3)
    figures = [
        matrix_figure(matrix, 1.0, "W"),
        factors_figure({"layers.0.q": (matrix, matrix, matrix)}, (1.0, 1.0, 1.0)),
        attention_figure(matrix, ["a", "b", "c"], "attention"),
    ]
    images = [image for figure in figures for axes in figure.axes for image in axes.images]
    assert [image.get_interpolation() for image in images] == ["nearest"] * 5


def test_zero_is_white_and_the_signs_have_different_colours():
    (axes,) = matrix_figure(np.array([[-3.0, 0.0, 3.0]]), 2.0, "W").axes
    low, zero, high = axes.images[0].cmap(axes.images[0].norm([-3.0, 0.0, 3.0]))[:, :3]
    assert zero.min() > 0.95
    assert low[2] > low[0] and high[0] > high[2]  # blue, red


def test_one_outlier_does_not_pale_the_rest_of_a_matrix():
    matrix = np.linspace(-1, 1, 1000)
    assert full_colour(np.append(matrix, 1e6)) == pytest.approx(1, abs=0.02)
    assert full_colour(np.zeros(9)) > 0


def test_the_bars_of_strengths_have_the_probabilities_as_length_and_as_number():
    columns = {"base (0)": [0.25, 0.75], "adapter (1)": [0.5, 0.5], "chosen (0.3)": [0.125, 0.875]}
    labels = ["$x$ and <b>", "W" * 100]  # a formula, and a name without any space
    figure = strengths_figure(labels, columns)
    (axes,) = figure.axes
    widths = [[bar.get_width() for bar in group] for group in axes.containers]
    assert widths == list(columns.values())
    assert words(axes) == ["25.0%", "75.0%", "50.0%", "50.0%", "12.5%", "87.5%"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == labels[0]
    assert not axes.get_yticklabels()[0].get_parse_math()
    assert all(len(line) <= 30 for line in names[1].splitlines())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(columns)


def test_the_figure_of_ranks_shows_every_interval_and_marks_one_rank():
    rows = [
        {"rank": rank, "accuracy": 0.8 + 0.01 * rank, "low": 0.7, "high": 0.95}
        for rank in (1, 2, 4)
    ]
    (axes,) = ranks_figure(rows, 1).axes
    (segments,) = (bars.get_segments() for bars in axes.containers[0].lines[2])
    for segment, row in zip(segments, rows, strict=True):
        assert segment[:, 1] == pytest.approx([row["low"], row["high"]])
    mark = axes.lines[-1].get_xydata()
    assert mark == pytest.approx(np.array([[1, 0.82]]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    assert words(axes) == ["82.0%"]


def test_the_figure_of_attention_has_a_row_for_each_attending_token():
    weights = np.array([[1.0, 0.0], [0.25, 0.75]])
    axes = attention_figure(weights, ["$a$", "b"], "head").axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), weights)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["$a$", "b"]
        assert not labels[0].get_parse_math()
    assert axes.get_ylabel() == "attending token"
