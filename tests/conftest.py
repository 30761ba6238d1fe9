"""What the tests share: where optional things are, and small random models as references.

A test that needs something the machine may lack asks for a fixture here (``data``, ``browser``)
and is skipped without it. CLINORA_REQUIRE=data,browser makes such a skip a failure.
"""

import io
import os
import shutil
import signal
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Side by side, with several threads each, workers wait for each other. Set before torch is
    # imported, for this process and those that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"

import peft
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import clinora
from clinora.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from clinora.lora import LoRAConfig, apply_lora
from tests.served import Person, Served

SENTENCES = [
    "The patient reports severe chest pain and shortness of breath.",
    "The knee is swollen after a fall; the fracture was reduced under anesthesia.",
    "CT of the abdomen without contrast shows no acute abnormality.",
    "History of present illness: a pleasant woman with diabetes and hypertension.",
]


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the handlers after a test: serve.main, called in this process, changes them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def lacking(what: str, why: str) -> None:
    """Skip the test, or fail it where the environment requires what it lacks."""
    if what in os.environ.get("CLINORA_REQUIRE", "").split(","):
        pytest.fail(f"{what} is required here: {why}")
    pytest.skip(f"needs {what}: {why}")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with mtsamples.csv and llama2-tokenizer.model, named by CLINORA_DATA."""
    folder = os.environ.get("CLINORA_DATA")
    if not folder:
        lacking("data", "CLINORA_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def browser_path() -> str:
    """The Chromium to test pages with."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        lacking("browser", "no chromium on the PATH")
    return path


@pytest.fixture(scope="session")
def chromium(browser_path):
    """A browser without a window."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)  # a busy machine is slow
    quiet = ["background-networking", "component-update", "sync"]
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
    arguments += [f"--disable-{what}" for what in quiet]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """A run's folder as training leaves it, random but the same at every call; 128 tokens.

    Its base, with a SentencePiece model of 320 ids trained on a few sentences, lies beside it in
    ``base``. It has the published classes, and its answers differ from note to note.
    """
    folder = tmp_path_factory.mktemp("small")
    generator = torch.Generator().manual_seed(4)
    shape = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(shape)
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name))
    base.save_pretrained(folder / "base")
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=pieces, vocab_size=320,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (folder / "base" / "tokenizer.model").write_bytes(pieces.getvalue())

    model = clinora.load_model(folder / "base", num_labels=len(clinora.PUBLISHED_CLASSES))
    apply_lora(model, LoRAConfig(rank=4, alpha=8))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.head_trained = True
    tokenizer = clinora.Tokenizer(folder / "base" / "tokenizer.model")
    run = clinora.Classifier(model, tokenizer, clinora.PUBLISHED_CLASSES, token_limit=128)
    run.save(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def classifier(small_run):
    return clinora.Classifier.load(small_run, device="cpu", precision="fp32")


@pytest.fixture
def flags_folder(tmp_path):
    return tmp_path / "flagged"


@pytest.fixture
def client(classifier, flags_folder):
    """A client of the app, without a port; it has visited the page and has the visit's cookie."""
    from fastapi.testclient import TestClient

    from clinora.serving.app import create_app

    app = create_app(classifier, flags_folder)
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        client.get("/config")
        yield client


@pytest.fixture(scope="module")
def lasting_client(classifier, tmp_path_factory):
    """A client of one app for all tests of a module that neither change it nor fill its queue."""
    from fastapi.testclient import TestClient

    from clinora.serving.app import create_app

    app = create_app(classifier, tmp_path_factory.mktemp("lasting") / "flagged")
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        client.temporary = os.environ["GRADIO_TEMP_DIR"]
        yield client


@pytest.fixture
def visitor(lasting_client, monkeypatch):
    """The lasting client on a visit of its own, with new cookies and without files."""
    # Gradio reads it at each event; any app that was made since has changed it.
    monkeypatch.setenv("GRADIO_TEMP_DIR", lasting_client.temporary)
    lasting_client.cookies.clear()
    lasting_client.get("/config")
    return lasting_client


@pytest.fixture(scope="module")
def served(small_run, tmp_path_factory):
    """A process of serve.py, one for all tests of a module."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "tmp").mkdir()
    options = ["--run", small_run, "--port", "0"]
    options += ["--rate-limit", "1000000000"]  # all tests of a module are one user
    served = Served(folder, *options, temporary=folder / "tmp")
    try:
        served.url()
        yield served
    finally:
        served.kill()


@pytest.fixture
def start(tmp_path):
    """Start serve.py with options; it is gone after the test, whatever becomes of that."""

    def start_one(*options):
        folder = tmp_path / f"served{len(started)}"
        folder.mkdir()
        started.append(Served(folder, *options, temporary=tmp_path / "tmp"))
        return started[-1]

    started = start_one.started = []
    (tmp_path / "tmp").mkdir()
    yield start_one
    for served in started:
        served.kill()


@pytest.fixture
def person(chromium, served):
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    person = Person(context.new_page(), served.url())
    yield person
    stored = person.page.evaluate("[{...localStorage}, {...sessionStorage}, document.cookie]")
    context.close()
    assert person.strangers == []
    assert person.complaints == []
    assert stored == [{}, {}, ""]


@pytest.fixture
def reference(tmp_path):
    """Make small random Transformers models on disk.

    ``reference(num_labels=5, dtype=..., **config)`` gives the model, reloaded in ``dtype`` as
    Transformers loads it, and its folder. Weights are larger than at initialisation and norm
    weights are not 1, so that a wrong scale or a swapped weight shows.
    """
    made = []

    def make(
        num_labels: int | None = 5, dtype: torch.dtype = torch.float32, seed: int = 0, **shape
    ):
        config = transformers.LlamaConfig(
            **{
                "vocab_size": 97,
                "hidden_size": 64,
                "intermediate_size": 112,
                "num_hidden_layers": 3,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-5,
                "pad_token_id": 0,
                "num_labels": num_labels or 2,
            }
            | shape
        )
        kind = (
            transformers.LlamaForSequenceClassification
            if num_labels
            else transformers.LlamaForCausalLM
        )
        model = kind(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + ("norm" in name))
        folder = tmp_path / f"base{len(made)}"
        made.append(folder)
        model.save_pretrained(folder)
        return kind.from_pretrained(folder, dtype=dtype).eval(), folder

    return make


@pytest.fixture
def twins(reference):
    """Make ours and Transformers' model of the same weights.

    ``twins(num_labels=5, dtype=..., **config)`` gives (ours, theirs), both in evaluation mode.
    """

    def make(num_labels: int | None = 5, dtype: torch.dtype = torch.float32, **shape):
        theirs, folder = reference(num_labels, dtype, **shape)
        config = LlamaConfig.from_json(folder / "config.json")
        ours = (
            LlamaForSequenceClassification(config, num_labels)
            if num_labels
            else LlamaForCausalLM(config)
        )
        ours.load_state_dict(load_file(folder / "model.safetensors"))
        return ours.to(dtype).eval(), theirs

    return make


@pytest.fixture
def adapted_twins(twins):
    """Make ours with LoRA and Transformers' with PEFT, of the same base, A, B and head.

    ``adapted_twins(lora, random_b=True, **what twins takes)`` gives (ours, theirs, pairs), where
    ``pairs`` maps the name of each of our trained parameters to PEFT's parameter.
    """

    def make(lora: LoRAConfig, random_b: bool = True, **base):
        ours, theirs = twins(**base)
        theirs = peft.get_peft_model(
            theirs,
            peft.LoraConfig(
                task_type="SEQ_CLS",
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
                use_rslora=lora.rank_stabilized,
            ),
        )
        apply_lora(ours, lora)
        pairs = {
            name.removeprefix("base_model.model.")
            .replace(".modules_to_save.default", "")
            .replace(".default.weight", ""): parameter
            for name, parameter in theirs.named_parameters()
            if parameter.requires_grad
        }
        mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
        assert mine.keys() == pairs.keys()
        with torch.no_grad():
            for name, parameter in mine.items():
                if random_b and name.endswith("lora_B"):
                    nn.init.normal_(pairs[name], std=0.05)
                parameter.copy_(pairs[name])
        return ours, theirs, pairs

    return make


@pytest.fixture
def notes():
    """Make a ragged batch: ``notes(lengths)`` gives (ids padded with 0 on the right, lengths)."""

    def make(lengths: tuple[int, ...], vocab_size: int = 97, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), max(lengths))
        ids = torch.randint(3, vocab_size, shape, generator=generator)
        lengths = torch.tensor(lengths)
        ids[torch.arange(shape[1]) >= lengths[:, None]] = 0
        return ids, lengths

    return make


@pytest.fixture
def difference():
    """Measure two tensors apart: the largest |a − b| over the largest |b|, in float64."""

    def measure(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape
        return ((a - b).abs().max() / b.abs().max()).item()

    return measure


@pytest.fixture
def fill_b():
    """Give every B random numbers, ours and PEFT's, so that an adapter does something."""

    def fill(model: nn.Module, std: float = 0.1) -> nn.Module:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name.split("."):
                    parameter.normal_(std=std)
        return model

    return fill


@pytest.fixture
def one_thread():
    """Compute on one thread: for small tensors the others only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    """Let every test draw the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
