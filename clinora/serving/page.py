"""The page: its tabs, its theme and its words about the API and the model."""

import gradio as gr

from clinora.serving.batcher import Batcher
from clinora.serving.classify_tab import classify_tab
from clinora.serving.flags import Flags
from clinora.serving.internals_tab import internals_tab
from clinora.serving.lesson_process import Lessons
from clinora.serving.many_tab import many_tab
from clinora.serving.storage import Storage

TITLE = "Clinical Note Classifier"
DESCRIPTION = (
    "This model classifies clinical notes into diagnosis categories. Choose your output format."
)
DISCLAIMER = "Demonstration only, not a medical device."

THEME = gr.themes.Default(
    primary_hue="blue",
    secondary_hue="slate",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { max-width: min(1080px, 100vw) !important; margin: 0 auto !important; }
.gradio-container .column, .gradio-container .block { min-width: 0 !important; max-width: 100%; }
/* On a phone, columns are stacked, and nothing is cut off. */
.gradio-container .row > .column, .gradio-container .row > .block,
.gradio-container .row > .form > .block { min-width: min(300px, 100%) !important; }
/* On a phone, the examples come last, so that the prediction directly follows the note. */
@media (max-width: 700px) {
  .note-and-answer > .column { display: contents; }
  .note-and-answer > .column > * { flex: 0 0 100%; }
  #examples { order: 1; }
}
.gradio-container :focus-visible { outline: 2px solid var(--color-accent) !important; }
.small { font-size: var(--text-sm); }
.refer p { border-left: 4px solid var(--color-red); padding-left: 12px; font-weight: 600; }
/* Gradio's default breaks words anywhere, and its colour at −1 is too dark to read text on. */
.gradio-container .textfield { word-break: normal; overflow-wrap: anywhere; }
/* Long class names wrap in the predictions, in the heading and beside their bars. */
.gradio-container .output-class, .gradio-container .confidence-set .text,
.gradio-container .json-node .content { overflow-wrap: anywhere; min-width: 0; }
.gradio-container .score-token { --pale: color-mix(in srgb, var(--body-background-fill) 40%, #0000);
  background-image: linear-gradient(var(--pale), var(--pale)); }
"""

CURL = """curl -s {url}/v1/classify \\
  -H 'Content-Type: application/json' \\
  -d '{{"note": "Severe chest pain. ECG shows ST elevation."}}'"""
PYTHON = """import httpx

note = "Severe chest pain. ECG shows ST elevation."
print(httpx.post("{url}/v1/classify", json={{"note": note}}).json())"""
API_WORDS = """`GET /health` and `GET /ready` tell whether the service is alive and has room for a
note. `POST /v1/classify` takes `{"note": "…"}` or `{"notes": ["…", …]}`. Where `tokens_exact` is
false, the note is longer than what is read, and has at least `tokens` tokens. A busy service
answers 503 with `Retry-After`. Where a password file is in use, page and API ask for name and
password (`curl -u NAME`, `httpx.post(…, auth=(name, password))`)."""


def build_page(
    batcher: Batcher,
    flags: Flags,
    storage: Storage,
    lessons: Lessons | None,
    card: str,
    url: str,
) -> gr.Blocks:
    """Build the page.

    Args:
        batcher: Runs the model for all visitors.
        flags: Stores flagged predictions.
        storage: Stores the visitors' files.
        lessons: Gives the live lesson; None if it is off.
        card: The model card, in Markdown.
        url: The page's address, for the examples.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n\n{DESCRIPTION}")
        gr.Markdown(DISCLAIMER, elem_classes="small")
        with gr.Tab("Classify"):
            classify_tab(batcher, flags)
        with gr.Tab("LoRA internals") as internals:
            internals_tab(batcher, lessons, internals)
        with gr.Tab("Many notes"):
            many_tab(batcher, storage)
        with gr.Tab("API"):
            gr.Markdown(API_WORDS)
            gr.Code(CURL.format(url=url), language="shell", label="curl", interactive=False)
            gr.Code(PYTHON.format(url=url), language="python", label="Python", interactive=False)
        with gr.Tab("Model card"):
            gr.Markdown(card, latex_delimiters=[])
    return page
