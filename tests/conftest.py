"""What the tests share: where optional things are, and small random models as references.

A test that needs something the machine may lack asks for a fixture here (``data``, ``browser``)
and is skipped without it. CLINORA_REQUIRE=data,browser makes such a skip a failure.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers


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
