"""The page's tab about LoRA: parameter counts, a live lesson, results, and the loaded adapter."""

import gradio as gr
import torch
from gradio.components.plot import PlotData

from clinora.budget import base_parameters, linear_shapes, lora_targets
from clinora.explain import layer_updates
from clinora.llama import LlamaConfig
from clinora.lora import lora_layers
from clinora.lora_figures import (
    full_colour,
    matrix_figure,
    singular_values_figure,
    updates_figure,
)
from clinora.serving.batcher import Batcher
from clinora.serving.events import client_of_event, message, wait_for, with_error_messages
from clinora.serving.filling import Filling, draw, fill_when_opened, fills
from clinora.serving.internals_lesson import lesson_part
from clinora.serving.internals_note import note_part
from clinora.serving.internals_results import results_part
from clinora.serving.lesson_process import Lessons

TINYLLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)
MOST_SHOWN = 128  # rows and columns of a matrix: with more, single entries could not be seen


def internals_tab(batcher: Batcher, lessons: Lessons | None, tab: gr.Tab, example: str) -> None:
    """Add the tab's contents, with a note to start with, to the page that is being built."""
    lora = batcher.classifier.model.lora_config
    gr.Markdown(
        f"The loaded adapter: rank {lora.rank}, α = {lora.alpha:g}, on {', '.join(lora.targets)}. "
        f"In these layers {lora.equation} takes the place of W, with A (r × in) and B (out × r). "
        "ΔW is the difference between the two."
    )
    _count_part(batcher)
    lesson_part(lessons)
    filled = gr.State(set())  # the numbers of the components that are filled in this visit
    fillings = [
        results_part(filled),
        _adapter_part(batcher, filled),
        note_part(batcher, example, filled),
    ]
    fill_when_opened(tab, fillings, filled, "open_internals")


def _count_part(batcher: Batcher) -> None:
    """Add the table of how many parameters a rank trains."""
    model = batcher.classifier.model
    lora = model.lora_config
    config = model.model.config
    adapted = []  # last parts of the names, since a target may be "layers.0.self_attn.q_proj"
    for target in lora.targets:
        name = target.split(".")[-1]
        if name not in adapted:
            adapted.append(name)

    def count(rank: float, targets: list[str] | None) -> list[list[str]]:
        rows = []
        for name, shape in (("the loaded base", config), ("TinyLlama", TINYLLAMA)):
            try:
                layers = lora_targets(shape, int(rank), tuple(targets or ()))
            except ValueError as error:  # its message says which rank and targets are possible
                rows.append([name, str(error), "", "", ""])
                continue
            trained = sum(layer.lora for layer in layers)
            full = sum(layer.full for layer in layers)
            share = trained / base_parameters(shape, None)
            rows.append(
                [name, f"{trained:,}", f"{4 * trained / 1e6:,.2f}", f"{share:.3%}", f"{full:,}"]
            )
        return rows

    with gr.Row():
        rank = gr.Slider(1, max(64, lora.rank), lora.rank, step=1, label="Rank r")
        targets = gr.CheckboxGroup(
            list(linear_shapes(config)), value=adapted, label="Layers to adapt"
        )
    counts = gr.Dataframe(
        count(lora.rank, adapted), interactive=False, label="What LoRA would train",
        headers=["base", "parameters r·(in + out)", "MB as float32", "of the base",
                 "full training of these layers"],
    )  # fmt: skip
    for chosen, event in ((rank, "count_for_rank"), (targets, "count_for_targets")):
        chosen.change(
            with_error_messages(count), [rank, targets], counts, trigger_mode="always_last",
            api_name=event,
        )  # fmt: skip


def _adapter_part(batcher: Batcher, filled: gr.State) -> Filling:
    """Add the pictures of what the loaded adapter changed, and say what fills them."""
    model = batcher.classifier.model
    layers = dict(lora_layers(model))
    names = list(layers)

    @torch.no_grad()
    def matrices(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the first rows and columns of W and of ΔW."""
        layer = layers[name]
        weight = layer.weight.to(layer.lora_A.dtype)
        update = layer.adapted(weight) - weight
        part = (slice(MOST_SHOWN), slice(MOST_SHOWN))
        return weight[part].cpu(), update[part].cpu()

    def show_weights(name: str | None) -> tuple[PlotData, PlotData, PlotData]:
        if name is None:
            raise message("Choose a layer first.")
        future = batcher.submit_job(lambda: matrices(name), client=client_of_event())
        weight, update = (matrix.numpy() for matrix in wait_for(future))
        limit = full_colour(weight)
        return (
            draw(matrix_figure(weight, limit, "W")),
            draw(matrix_figure(update, full_colour(update), "ΔW")),
            draw(matrix_figure(weight + update, limit, "W + ΔW")),
        )

    def first_values() -> tuple[PlotData, ...]:
        updates = layer_updates(model)
        return (
            draw(updates_figure(updates)),
            draw(singular_values_figure(updates)),
            *show_weights(names[0]),
        )

    gr.Markdown("## The loaded adapter")
    with gr.Row():
        changes = gr.Plot(show_label=False)
        spectrum = gr.Plot(show_label=False)
    chosen = gr.Dropdown(names, value=names[0], label="Layer whose matrices are shown")
    gr.Markdown(
        "Blue is below zero, red is above it, and zero has the colour of the background. At most "
        f"the first {MOST_SHOWN} rows and columns are shown. W and W + ΔW have the same colours. "
        "ΔW has its own colours.",
        elem_classes="small",
    )
    with gr.Row():
        weights = [gr.Plot(show_label=False) for _ in range(3)]
    chosen.change(
        fills(weights, show_weights), [chosen, filled], weights, trigger_mode="always_last",
        api_name="show_weights",
    )  # fmt: skip
    return Filling([changes, spectrum, *weights], first_values)
