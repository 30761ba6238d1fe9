"""The live lesson on the page: a visitor trains LoRA for 20 steps, and sees it merged."""

from collections.abc import Iterator

import gradio as gr

from clinora.serving.events import (
    check_visitor,
    message,
    session_of_event,
    with_error_messages,
)
from clinora.serving.filling import plot_of
from clinora.serving.lesson_process import (
    MOST_SHOWN,
    Lessons,
    LessonStoppedError,
    LessonTakenError,
    LessonTimeError,
)


def lesson_part(lessons: Lessons | None) -> None:
    """Add the lesson to the tab that is being built; None says that it is off."""
    gr.Markdown("## Train LoRA")
    if lessons is None:
        gr.Markdown("The live lesson is off on this server.")
        return

    def train() -> Iterator[tuple]:
        status = "Loading a copy of the bundled base."
        yield status, gr.skip(), gr.skip()
        try:
            for part in lessons.run(session_of_event(), check_visitor):
                if "step" not in part:
                    yield _comparison(part), gr.skip(), gr.skip()
                    return
                status = _status(part)
                yield status, plot_of(part["steps_picture"]), plot_of(part["factors_picture"])
        except LessonTakenError:
            raise message("Another visitor has the lesson now: try again in a minute.") from None
        except LessonStoppedError:
            yield f"Stopped. {status}", gr.skip(), gr.skip()
        except LessonTimeError:
            yield f"Stopped after {lessons.seconds:g} s. {status}", gr.skip(), gr.skip()

    def stop() -> None:
        lessons.stop(session_of_event())

    gr.Markdown(
        "This trains LoRA of rank 8 on q_proj and v_proj, and a head, in a copy of the bundled "
        "base: 20 steps of AdamW on the bundled notes, each on 8 notes of at most 64 tokens. B "
        "starts at zero, so B·A does too, and grows with the steps. At the end, LoRA is merged "
        "into the weights. The model that this page serves does not change.\n\n"
        "The matrices are those of the first two adapted layers, at most their first "
        f"{MOST_SHOWN} rows and columns: blue is below zero, red is above it, and zero has the "
        "colour of the background."
    )
    with gr.Row():
        start = gr.Button("Train 20 steps", variant="primary", min_width=150)
        end = gr.Button("Stop", min_width=150)
    status = gr.Markdown()
    with gr.Row():
        steps = gr.Plot(show_label=False)
        factors = gr.Plot(show_label=False)
    start.click(
        with_error_messages(train), None, [status, steps, factors], show_progress="hidden",
        api_name="train_lesson",
    )  # fmt: skip
    end.click(with_error_messages(stop), None, None, api_name="stop_lesson")


def _status(part: dict) -> str:
    if part["loss"] is None:
        return "Step 0: B is zero, so the model computes exactly what its base does."
    return (
        f"Step {part['step']} of {part['steps']}: loss {part['loss']:.2f} nats, largest ‖s·B·A‖ "
        f"of a layer {part['norm']:.2f}."
    )


def _comparison(part: dict) -> str:
    """Describe the comparison at the end, as a table and a sentence."""
    lines = [f"| {part['notes']} test notes | loss (nats) | accuracy |", "|---|---:|---:|"]
    times = ("before training", "trained", "merged")
    for when, loss, accuracy in zip(times, part["losses"], part["accuracies"], strict=True):
        lines.append(f"| {when} | {loss:.3f} | {accuracy:.1%} |")
    table = "\n".join(lines)
    return (
        f"All steps are done, and LoRA was merged into the weights.\n\n{table}\n\nMerging changed "
        f"no probability by more than {100 * part['difference']:.5f} points: that is rounding."
    )
