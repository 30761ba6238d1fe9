"""The page: its tabs, its theme and its words about the API."""

from pathlib import Path

import gradio as gr

from clinora.serving.batcher import Batcher
from clinora.serving.classify_tab import classify_tab
from clinora.serving.flags import Flags
from clinora.serving.internals_tab import internals_tab
from clinora.serving.lesson_process import Lessons
from clinora.serving.many_tab import many_tab
from clinora.serving.storage import Storage
from clinora.serving.words import DISCLAIMER, PRIVACY, Words

THEME = gr.themes.Default(
    primary_hue="blue",
    secondary_hue="slate",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
STYLES = Path(__file__).parent / "page.css"
SCRIPT = Path(__file__).parent / "page.js"

CURL = """curl -s {url}/v1/classify \\
  -H 'Content-Type: application/json' \\
  -d '{{"note": "Severe chest pain. ECG shows ST elevation."}}'"""
PYTHON = """import httpx

note = "Severe chest pain. ECG shows ST elevation."
print(httpx.post("{url}/v1/classify", json={{"note": note}}).json())"""
API_WORDS = """[All routes, statuses and schemas](docs). `GET /v1/model` describes the run and the
limits, and `GET /metrics` serves Prometheus. `GET /health` and `GET /ready` tell whether the
service is alive and has room for a note. `POST /v1/classify` takes `{"note": "…"}` or `{"notes":
["…", …]}`. Where `tokens_exact` is false, the note is longer than what is read, and has at least
`tokens` tokens. A busy service answers 503 with `Retry-After`. Where a password file is in use,
page and API ask for name and password (`curl -u NAME`, `httpx.post(…, auth=(name, password))`)."""


def build_page(
    batcher: Batcher,
    flags: Flags,
    storage: Storage,
    words: Words,
    lessons: Lessons | None,
    card: str,
    url: str,
) -> gr.Blocks:
    """Build the page.

    Args:
        batcher: Runs the model for all visitors.
        flags: Stores flagged predictions.
        storage: Stores the visitors' files.
        words: The page's words about the run.
        lessons: Gives the live lesson; None if it is off.
        card: The model card, in Markdown.
        url: The page's address, for the examples.
    """
    with gr.Blocks(title=words.title, analytics_enabled=False) as page:
        gr.Markdown(f"# {words.title}\n\n{words.description}")
        gr.Markdown(
            f"<p>{words.purpose}</p><p>{PRIVACY}</p><p>{DISCLAIMER}</p>", latex_delimiters=[],
            elem_classes="small",
        )  # fmt: skip
        with gr.Tab("Classify"):
            classify_tab(batcher, flags, storage, words)
        with gr.Tab("LoRA internals") as internals:
            example = words.examples[0] if words.examples else ""
            internals_tab(batcher, lessons, internals, example)
        with gr.Tab("Many notes"):
            many_tab(batcher, storage)
        with gr.Tab("API"):
            gr.Markdown(API_WORDS)
            gr.Code(CURL.format(url=url), language="shell", label="curl", interactive=False)
            gr.Code(PYTHON.format(url=url), language="python", label="Python", interactive=False)
        with gr.Tab("Model card"):
            gr.Markdown(card, latex_delimiters=[], elem_classes="model-card")
    return page


def page_head() -> str:
    """Return what the page's head holds in addition to Gradio's: the page's own script."""
    return f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"
