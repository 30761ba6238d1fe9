"""What the loaded adapter does with one note: strengths, merging and attention."""

import gradio as gr
from gradio.components.plot import PlotData
from torch.func import functional_call

import clinora
from clinora.attention import attention_weights
from clinora.classifier import Classifier
from clinora.lora_figures import attention_figure, strengths_figure
from clinora.notes import ordinary_case
from clinora.serving.batcher import Batcher
from clinora.serving.events import checked_note, client_of_event, wait_for, with_error_messages
from clinora.serving.filling import Filling, draw, fills

MOST_ATTENTION_TOKENS = 40  # more labels could not be read
FIRST_STRENGTH = 1.0


def note_part(batcher: Batcher, example: str, filled: gr.State) -> Filling:
    """Add a note and what shows the adapter at work on it, and say what fills the pictures.

    Args:
        batcher: Runs the model for all visitors.
        example: The note that the tab begins with; "" without one, and then without pictures.
        filled: The state of a visit that holds the numbers of its filled components.
    """
    classifier = batcher.classifier
    model = classifier.model
    lora = model.lora_config
    config = model.model.config
    first_layer = config.num_hidden_layers // 2

    def compare_strengths(note: str | None, strength: float) -> PlotData:
        note = checked_note(note)
        names = {"base (0)": 0.0, "adapter (1)": 1.0, f"chosen ({strength:g})": float(strength)}
        columns = wait_for(
            batcher.submit_job(
                lambda: probabilities_at(classifier, note, list(names.values())),
                client=client_of_event(),
            )
        )
        figure = strengths_figure(classifier.labels, dict(zip(names, columns, strict=True)))
        return draw(figure)

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

            ids = classifier.encode(note)[: classifier.token_limit]
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

    def show_attention(note: str | None, layer: float, head: float) -> PlotData:
        note = checked_note(note)
        layer = int(layer)
        head = int(head)
        ids = classifier.encode(note)[:MOST_ATTENTION_TOKENS]
        weights = wait_for(
            batcher.submit_job(
                lambda: attention_weights(classifier, ids, layer)[head], client=client_of_event()
            )
        )
        tokens = token_texts(classifier, note, len(ids))
        return draw(attention_figure(weights.numpy(), tokens, f"layer {layer}, head {head}"))

    gr.Markdown("## On a note")
    note = gr.Textbox(example, label="A note to try the adapter on", lines=3, max_lines=8)
    strength = gr.Slider(0, 2, FIRST_STRENGTH, step=0.05, label="Strength of the adapter")
    bars = gr.Plot(show_label=False)
    with gr.Row():
        compare = gr.Button("Compare strengths")
        merge = gr.Button("Merge and compare")
    merged = gr.Markdown()
    gr.Markdown(
        "Attention: how much a token (row) attends to itself and to the tokens before it "
        f"(columns), for the first {MOST_ATTENTION_TOKENS} tokens of the note. Each row sums to 1."
    )
    with gr.Row():
        layer = gr.Slider(
            0, config.num_hidden_layers - 1, first_layer, step=1, label="Layer of the attention"
        )
        head = gr.Slider(0, config.num_attention_heads - 1, 0, step=1, label="Head")
    attend = gr.Button("Show attention")
    attention = gr.Plot(show_label=False)

    strengths = fills([bars], compare_strengths)
    attending = fills([attention], show_attention)
    compare.click(strengths, [note, strength, filled], bars, api_name="compare_strengths")
    strength.change(
        strengths, [note, strength, filled], bars, trigger_mode="always_last",
        api_name="compare_moved_strength",
    )  # fmt: skip
    merge.click(with_error_messages(compare_merged), note, merged, api_name="compare_merged")
    attend.click(attending, [note, layer, head, filled], attention, api_name="show_attention")
    for chosen, event in ((layer, "show_attention_layer"), (head, "show_attention_head")):
        chosen.change(
            attending, [note, layer, head, filled], attention, trigger_mode="always_last",
            api_name=event,
        )  # fmt: skip

    def first_values() -> tuple[PlotData | None, PlotData | None]:
        if not example:
            return None, None
        return compare_strengths(example, FIRST_STRENGTH), show_attention(example, first_layer, 0)

    return Filling([bars, attention], first_values)


def probabilities_at(
    classifier: Classifier, note: str, strengths: list[float]
) -> list[tuple[float, ...]]:
    """Give a note's probabilities of all classes at each strength of the adapter."""
    columns = []
    for strength in strengths:
        with clinora.lora_strength(classifier.model, strength):
            columns.append(classifier([note])[0].probabilities)
    return columns


def token_texts(classifier: Classifier, note: str, count: int) -> list[str]:
    """Give the text of each of a note's first tokens; one that begins the input has none."""
    places = classifier.tokenizer.places(ordinary_case(note), count)  # as the model reads it
    in_front = len(classifier.tokenizer.first)  # tokens that are no part of the note
    texts = ["⟨start⟩"] * in_front
    for begin, end in places[in_front:]:
        text = note[begin:end]
        texts.append("".join(c if c.isprintable() else "·" for c in text).strip() or "·")
    return texts
