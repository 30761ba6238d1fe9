"""The page's tab about LoRA: parameter counts, the adapter's updates, strengths and merging."""

import gradio as gr
from torch.func import functional_call

import clinora
from clinora.budget import base_parameters, linear_shapes, lora_targets
from clinora.explain import layer_updates
from clinora.figures import singular_values_figure, updates_figure
from clinora.llama import LlamaConfig
from clinora.serving.batcher import Batcher
from clinora.serving.events import checked_note, client_of_event, wait_for, with_error_messages

TINYLLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)


def internals_tab(batcher: Batcher, example: str) -> None:
    """Add the tab's contents, with a note to start with, to the page that is being built."""
    classifier = batcher.classifier
    model = classifier.model
    labels = classifier.labels
    lora = model.lora_config
    config = model.model.config
    updates = layer_updates(model)
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

    def compare_strengths(note: str | None, strength: float) -> list[list[str]]:
        note = checked_note(note)
        chosen = min(2.0, max(0.0, float(strength)))

        def job() -> list:
            probabilities = []
            for value in (0.0, 1.0, chosen):
                with clinora.lora_strength(model, value):
                    probabilities.append(classifier([note])[0].probabilities)
            return probabilities

        columns = wait_for(batcher.submit_job(job, client=client_of_event()))
        rows = []
        for i, label in enumerate(labels):
            rows.append([label, *(f"{column[i]:.1%}" for column in columns)])
        return rows

    def compare_merged(note: str | None) -> str:
        note = checked_note(note)

        def job() -> tuple:
            replaced = {}
            for name, layer in model.named_modules():
                if isinstance(layer, clinora.LoRALinear):
                    replaced[f"{name}.weight"] = clinora.merged_weight(layer)

            def run_merged(*inputs: object) -> object:
                with clinora.lora_disabled(model):
                    return functional_call(model, replaced, inputs)

            ids = classifier.tokenizer.encode(note, classifier.token_limit)
            logits = classifier.logits([ids], run_merged)
            return classifier([note])[0].probabilities, logits.softmax(-1)[0].tolist()

        separate, merged = wait_for(batcher.submit_job(job, client=client_of_event()))
        difference = max(abs(p - q) for p, q in zip(separate, merged, strict=True))
        dtype = str(classifier.dtype).removeprefix("torch.")
        return (
            f"Largest difference of a probability: {100 * difference:.2g} points. The merged "
            f"weight {lora.equation} is rounded once, to {dtype}; the model that is served was not "
            "changed."
        )

    gr.Markdown(
        f"The loaded adapter: rank {lora.rank}, α = {lora.alpha:g}, on {', '.join(lora.targets)}. "
        f"In these layers {lora.equation} takes the place of W, with A (r × in) and B (out × r). "
        "ΔW is the difference of both."
    )
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
    with gr.Row():
        gr.Plot(updates_figure(updates), format="png", show_label=False)
        gr.Plot(singular_values_figure(updates), format="png", show_label=False)
    note = gr.Textbox(example, label="A note to try strengths on", lines=3, max_lines=8)
    strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the adapter")
    table = gr.Dataframe(
        headers=["class", "base (0)", "adapter (1)", "chosen strength"], interactive=False,
        label="Probabilities; the trained head stays on", wrap=True,
        column_widths=["40%", "20%", "20%", "20%"],
    )  # fmt: skip
    compare = gr.Button("Compare strengths")
    merge = gr.Button("Merge and compare")
    merged = gr.Markdown()
    strengths = with_error_messages(compare_strengths)
    compare.click(strengths, [note, strength], table, api_name="compare_strengths")
    strength.change(
        strengths, [note, strength], table, trigger_mode="always_last",
        api_name="compare_moved_strength",
    )  # fmt: skip
    merge.click(with_error_messages(compare_merged), note, merged, api_name="compare_merged")
