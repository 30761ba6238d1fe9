"""The published base: its files, its model card, and how much it copies from its notes.

Shapes: B notes, T tokens, D width, V vocabulary.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from clinora.checkpoint import write_atomically
from clinora.figures import BLACK, LIGHT
from clinora.llama import LlamaForCausalLM
from clinora.notes import text_sha256
from clinora.report import png
from tools.pretraining.corpus import Source

# How copying is measured: the number of beginnings of notes, the tokens of each, the tokens that
# the model adds, and the tokens in a row that count as a copy.
COPYING = {"beginnings": 500, "prompt": 64, "continued": 100, "run": 50}


@torch.inference_mode()
def share_copied(
    model: LlamaForCausalLM,
    beginnings: Tensor,
    notes: Sequence[list[int]],
    continued: int,
    run: int,
) -> float:
    """Continue beginnings of notes greedily; give the share of continuations that copy a note.

    Args:
        model: The base.
        beginnings: (N, T) token ids.
        notes: Token ids of all notes that the base was trained on.
        continued: Tokens of a continuation.
        run: Tokens in a row, from any of the notes, that count as a copy.
    """
    runs_of_notes = set()
    for note in notes:
        runs_of_notes.update(_runs(note, run))
    copied = 0
    for part in tqdm(beginnings.split(50), desc="copying", unit="part"):
        for _ in range(continued):
            lengths = torch.full((len(part),), part.size(1), device=part.device)
            states = model.model(part, lengths)  # (B, D)
            logits = F.linear(states, model.model.embed_tokens.weight)  # (B, V)
            part = torch.cat((part, logits.argmax(-1, keepdim=True)), 1)
        for added in part[:, -continued:].tolist():
            copies_a_note = any(ids in runs_of_notes for ids in _runs(added, run))
            if copies_a_note:
                copied += 1
    return copied / len(beginnings)


def _runs(ids: list[int], length: int) -> list[tuple[int, ...]]:
    """List all runs of ``length`` ids in a row."""
    return [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]


def token_rate(curve: Sequence[dict]) -> float:
    """Give the median training rate in tokens per second; other work may slow some intervals."""
    rates = []
    start = {"tokens": 0, "seconds": 0}
    for before, after in itertools.pairwise([start, *curve]):
        seconds = after["seconds"] - before["seconds"]
        if seconds > 0:  # they are rounded
            rates.append((after["tokens"] - before["tokens"]) / seconds)
    return statistics.median(rates)


def loss_figure(curve: Sequence[dict]) -> Figure:
    """Draw the loss on training windows and on held-out texts against the number of tokens."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [point["tokens"] / 1e6 for point in curve]
    loss = [point["loss"] for point in curve]
    held_out = [point["held_out"] for point in curve]
    axes.plot(tokens, loss, color=LIGHT, label="training")
    axes.plot(tokens, held_out, color=BLACK, label="held-out texts")
    axes.set(xlabel="million tokens", ylabel="loss (nats a token)", title="Pretraining")
    axes.legend()
    return figure


CARD = """---
language: en
library_name: clinora
license: other
license_name: apache-2.0-with-the-licences-of-its-texts
license_link: README.md#what-it-read
---

# Clinora's small medical Llama

A causal language model of {parameters:,} parameters ({layers} layers, width {width}, {vocab:,}
pieces of vocabulary, {positions:,} positions), trained on English medical text to be fine-tuned
with LoRA. Transformers' `LlamaForCausalLM` loads it too. Made by

```sh
python -m tools.pretrain_base --corpus FOLDER --out FOLDER {command}
```

It read {tokens:.1f} million tokens, {passes:.1f} passes through the stream of {stream:.1f} million
that the table below describes, in {steps:,} steps of {batch:,}, in {minutes:.0f} minutes on
{device}: {rate:,.0f} tokens a second (median), {share:.0%} of the rate of the machine's large
bfloat16 products ({peak:,.0f} GFLOP/s; attention's own products are not counted). On held-out texts
the loss is {held_out:.3f} nats a token ({windows} windows of {window} tokens).

![loss](loss.png)

## What it read

| source | from | licence | texts | million words | in a pass |
|---|---|---|---:|---:|---:|
{sources}

All texts were changed: cleaned, shortened and joined into one stream. Cases, articles and captions
of e3c_case_reports, roco_captions and evidence_inference are by many authors, whom those
repositories name; OpenStax's books can be read for free at openstax.org. The abstracts of
medical_abstracts and pubmedqa are PubMed's, under the licences that those repositories state.
vaers_narratives and neiss_fireworks are about real people, without their names, as the US
Government published them. The licences' texts are at creativecommons.org/licenses and
opensource.org/license/mit. The code and these weights are offered under Apache-2.0; those texts
that are CC BY-SA (medical_abstracts, and some of e3c_case_reports and evidence_inference) require
that what is made from them is shared under the same licence.

Of MTSamples it read the texts of all specialties that Clinora's split puts on the training side,
each followed by its name and description where the file gives them (in every second reading after
the text's first 50 to 300 words), never by its specialty; and no text of the validation or test
side: `notes_sha256.txt` lists the hashes of those read. The corpus was built to share no 13 words
in a row with MTSamples. One text in a hundred of each source was held out to measure the loss.

## Limits

It is a demonstration, not a medical device: far too small to know medicine, and what it writes is
neither true nor safe. It reads English, at most {positions:,} tokens. Its texts are those of their
sources, with their gaps and biases; transcribed notes of one country dominate.

**Copying.** Of {beginnings} beginnings ({prompt} tokens) of MTSamples' training notes, continued
greedily for {continued} tokens, {copied:.1%} gave {run} or more tokens in a row that stand in a
training note.
"""


def write_base(
    folder: Path, model: LlamaForCausalLM, tokenizer: bytes, sources: Sequence[Source], about: dict
) -> None:
    """Write the base's folder, which Transformers can also load; the weights are bfloat16.

    Args:
        folder: Where to write.
        model: The base.
        tokenizer: The bytes of ``tokenizer.model``.
        sources: The texts that it was trained on; the first source is the notes.
        about: The values of the fields of ``CARD``, and the loss curve as ``curve``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.asdict(model.model.config)
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    scaling = config.pop("rope_scaling")
    if scaling is not None:
        rope |= {"rope_type": "llama3"} | scaling
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = parameter.detach().bfloat16().cpu().contiguous()
    rows = [_source_row(source) for source in sources]
    curve = about["curve"]
    notes = sources[0]
    hashes = sorted(text_sha256(text) for text in notes.texts + notes.held_out)
    files = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "tokenizer.model": tokenizer,
        "pretraining.jsonl": "".join(json.dumps(point) + "\n" for point in curve),
        "loss.png": png(loss_figure(curve)),
        "notes_sha256.txt": "".join(f"{sha256}\n" for sha256 in hashes),
        "README.md": CARD.format(sources="\n".join(rows), **about),
    }
    for name, data in files.items():
        if isinstance(data, str):
            data = data.encode()
        write_atomically(folder / name, data)


def _source_row(source: Source) -> str:
    """Format a source as a row of the card's table."""
    words = sum(len(text.split()) for text in source.texts) / 1e6
    return (
        f"| {source.name} | {source.origin} | {', '.join(source.licenses)} | "
        f"{len(source.texts):,} | {words:.2f} | {source.repeats:g} × |"
    )
