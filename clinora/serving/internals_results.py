"""Which rank is enough: measured accuracy, parameters and spectrum at each rank."""

import json

import gradio as gr
from gradio.components.plot import PlotData

from clinora.checkpoint import BUNDLED
from clinora.explain import LayerUpdate
from clinora.lora_figures import ranks_figure, singular_values_figure
from clinora.serving.events import message
from clinora.serving.filling import Filling, draw, fills

FIRST_RANK = "8"
RESULTS = BUNDLED / "ranks.json"  # made by tools.ranks


def results_part(filled: gr.State) -> Filling:
    """Add the results to the tab that is being built, and say what fills them.

    Args:
        filled: The state of a visit that holds the numbers of its filled components.
    """
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = report["ranks"]
    ranks = [str(row["rank"]) for row in rows]
    seeds = " ".join(map(str, report["seeds"]))

    def show(rank: str | None) -> tuple[str, PlotData, PlotData]:
        if rank is None:
            raise message("Choose a rank first.")
        place = ranks.index(rank)
        row = rows[place]
        updates = [
            LayerUpdate(
                name=update["name"],
                share=update["share"],
                singular_values=tuple(update["singular_values"]),
                effective_rank=update["effective_rank"],
            )
            for update in row["updates"]
        ]
        return (
            _words(row),
            draw(ranks_figure(rows, place)),
            draw(singular_values_figure(updates)),
        )

    gr.Markdown(
        "## Which rank is enough?\n\n"
        f"The bundled base, trained on the {report['training_notes']:,} training notes of "
        f"MTSamples and measured on its {report['test_notes']:,} test notes: "
        f"{report['training']['steps']} steps, {report['token_limit']} tokens of a note, α = 2r. "
        f"`python -m tools.ranks --notes mtsamples --seeds {seeds} --out runs/ranks` repeats it."
        f"\n\nOne learning rate ({report['training']['learning_rate']:g}) for all ranks and only "
        f"{report['training']['steps']} steps: small ranks are not trained to their best; "
        "chapter 7 of the course gives each rank its own rate."
    )
    chosen = gr.Radio(ranks, value=FIRST_RANK, label="Rank r")
    words = gr.Markdown()
    with gr.Row():
        accuracy = gr.Plot(show_label=False)
        spectrum = gr.Plot(show_label=False)
    outputs = [words, accuracy, spectrum]
    chosen.change(
        fills(outputs, show), [chosen, filled], outputs, trigger_mode="always_last",
        api_name="choose_result",
    )  # fmt: skip
    return Filling(outputs, lambda: show(FIRST_RANK))


def _words(row: dict) -> str:
    seeds = "one seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
    return (
        f"**Rank {row['rank']}**: {row['parameters']:,} parameters in A and B; "
        f"{row['accuracy']:.1%} of the notes are classified correctly (95% interval "
        f"{row['low']:.1%} to {row['high']:.1%}; {seeds})."
    )
