"""Train the small medical Llama that is bundled: a tokenizer, then a causal language model.

    python -m tools.pretrain_base --corpus FOLDER --notes mtsamples --out clinora/bundled/base

The corpus is a folder of ``*.jsonl.gz`` files, a JSON object with ``text`` and ``license`` on each
line. Of the notes only the training side of the split is read; the hashes of all that were read are
written beside the weights. Where the notes' file has ``sample_name`` and ``description``, these
stand after each note, so that the model learns to say what a note was about; never its specialty.
With ``--resume`` it goes on from its last checkpoint, on a CPU to the same bits.

Matrices learn by Muon, embedding and norms by AdamW, on float32 masters; forward and backward pass
compute in bfloat16, but for the embedding, whose gradient sums many rows.

Shapes: B windows, T tokens, D width, V vocabulary.
"""

import argparse
import dataclasses
import gzip
import io
import itertools
import json
import math
import random
import statistics
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import sentencepiece
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import clinora
from clinora.checkpoint import write_atomically
from clinora.device import choose_device, keep_freed_memory
from clinora.figures import BLACK, LIGHT
from clinora.llama import LlamaConfig, LlamaForCausalLM
from clinora.notes import find_notes, text_sha256
from clinora.report import png
from clinora.resume import State, hash_state
from clinora.tokenizer import Tokenizer

SHAPE = LlamaConfig(
    vocab_size=4096,
    hidden_size=320,
    intermediate_size=896,
    num_hidden_layers=6,
    num_attention_heads=4,  # few wide heads: the cost of attention grows with their number
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)

# Tokens of a window, and up to which share of the training: attention costs less in short ones.
STAGES = ((512, 0.8), (1024, 1.0))

# Of each source, how often it is read and where it comes from: repositories of GitHub at the
# revision used. What reads like notes counts more than articles and leaflets.
SOURCES = {
    "acibench_notes": (4, "wyim/aci-bench@b909b2b"),
    "primock57_notes": (4, "babylonhealth/primock57@cd2ac70"),
    "trec_patient_topics": (4, "ncbi-nlp/TrialGPT@f621313"),
    "medec_ms": (4, "abachaa/MEDEC@70268d2"),
    "e3c_case_reports": (2, "hltfbk/E3C-Corpus@8196181e"),
    "roco_captions": (2, "razorx89/roco-dataset@a1f0ad6"),
    "casimedicos": (1, "ixa-ehu/antidote-casimedicos@bead23e"),
    "vaers_narratives": (1, "rferrisx/VAERS@c5b6141", "OHNLP/covid19vaxae@b328bfe"),
    "docsref_im_guide": (1, "jzstraley/docsref@87c198ef2"),
    "medical_abstracts": (1, "sebischair/Medical-Abstracts-TC-Corpus@70a2d91"),
    "pubmedqa": (1, "pubmedqa/pubmedqa@1cbae8e"),
    "fda_label_sections": (1, "LHNCBC/fda-ars@8a5f850"),
    # Later revisions carry another licence.
    "openstax": (
        1,
        "openstax/osbooks-anatomy-physiology@b0058a7",
        "openstax/osbooks-microbiology@ecf34da",
        "openstax/osbooks-psychology@e061043",
    ),
    "neiss_fireworks": (1, "drusho/Analysis_of_US_Firework_Sales_and_Injuries@be98cd9"),
    "medquad": (1, "abachaa/MedQuAD@577bd37"),
    "evidence_inference": (0.5, "jayded/evidence-inference@b9831b6c"),
}
NOTES_REPEATS = 4
NOTES_ORIGIN = (
    "[harishnair04/mtsamples](https://huggingface.co/datasets/harishnair04/mtsamples), published "
    "as CC0 on [Kaggle](https://www.kaggle.com/datasets/tboyle10/medicaltranscriptions)"
)
HELD_OUT = 100  # one text of so many measures the loss
HELD_OUT_WINDOWS = 32  # at most, of the first stage's length
HEAD_TOKENS, HEAD_TOKENS_CUDA = 1024, 8192  # at a time: in a CPU's caches; few launches on a GPU
LOSS_EVERY, CHECKPOINT_EVERY = 50, 100  # steps
# Beginnings of notes to continue, tokens of each, tokens to add, tokens in a row that are a copy.
COPYING = {"beginnings": 500, "prompt": 64, "continued": 100, "run": 50}
TOKENIZER_LINES = 50_000  # that the tokenizer is trained on


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Texts of one origin.

    Attributes:
        name: Of the file, without its endings.
        texts: To train on.
        held_out: To measure the loss on.
        titles: What stands after a text, if anything.
        licenses: The licences that the texts carry.
        repeats: How often the texts are read.
        origin: Where they were published, in Markdown.
    """

    name: str
    texts: list[str]
    held_out: list[str]
    titles: dict[str, str]
    licenses: tuple[str, ...]
    repeats: float
    origin: str


def read_sources(corpus: Path, notes: str, seed: int) -> list[Source]:
    """Read the corpus, and of the notes the training side alone; a hundredth of each held out.

    Raises:
        FileNotFoundError: The folder holds no ``*.jsonl.gz`` file.
        ValueError: A file is not what it should be.
    """
    files = sorted(corpus.glob("*.jsonl.gz"))
    if not files:
        raise FileNotFoundError(f"no *.jsonl.gz file in {corpus}")
    training = [note.text for note in clinora.read_notes(notes, classes="all").on("training")]
    titles = read_titles(notes)
    titles = {text: titles[text] for text in training if text in titles}
    read = [("mtsamples", training, titles, {"CC0"}, NOTES_REPEATS, NOTES_ORIGIN)]
    for file in files:
        try:
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                rows = [(row["text"], row["license"]) for row in map(json.loads, lines)]
            if not all(isinstance(value, str) for row in rows for value in row):
                raise TypeError
        except (gzip.BadGzipFile, zlib.error, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} ({type(error).__name__}): expected gzip, and in each line a JSON object "
                "with text and license, both strings"
            ) from None
        name = file.name.removesuffix(".jsonl.gz")
        repeats, *places = SOURCES.get(name, (1,))
        origin = ", ".join(
            f"[{place}](https://github.com/{place.replace('@', '/tree/')})" for place in places
        )
        licenses = {license for _, license in rows}
        read.append((name, [text for text, _ in rows], {}, licenses, repeats, origin or "unknown"))
    sources = []
    for name, texts, titles, licenses, repeats, origin in read:
        texts = random.Random(seed).sample(texts, len(texts))
        cut = len(texts) // HELD_OUT
        sources.append(
            Source(
                name=name,
                texts=texts[cut:],
                held_out=texts[:cut],
                titles=titles,
                licenses=tuple(sorted(licenses)),
                repeats=repeats,
                origin=origin,
            )
        )
    return sources


def read_titles(notes: str) -> dict[str, str]:
    """Read what the file says of each text beside its specialty: its name and description."""
    with find_notes(notes).open(encoding="utf-8-sig") as file:  # its line ends become \n
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    if not {"sample_name", "description"} <= set(table.columns):
        return {}
    names = table["sample_name"].str.replace(r" - \d+$", "", regex=True).str.strip()
    titles = names + ": " + table["description"].str.strip()
    return dict(zip(table["transcription"].str.strip(), titles, strict=True))


def mix(sources: Sequence[Source], seed: int) -> list[str]:
    """Repeat the texts of each source as often as it says, and shuffle them all.

    Where a title follows, every second reading leaves the text after some words for the title:
    then both stand in one window.
    """
    draw, texts = random.Random(seed), []
    for source in sources:
        whole, part = divmod(source.repeats, 1)
        for reading in range(int(whole)):
            for text in source.texts:
                title = source.titles.get(text)
                if title and reading % 2:
                    text = " ".join(text.split(" ")[: draw.randint(50, 300)])
                texts.append(f"{text}\n{title}" if title else text)
        texts += draw.sample(source.texts, round(len(source.texts) * part))
    draw.shuffle(texts)
    return texts


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """Train a BPE SentencePiece model with Llama's conventions; returns the file's bytes.

    Raises:
        ValueError: The texts do not make that many pieces.
    """
    model = io.BytesIO()
    lines = [line for text in texts for line in text.split("\n") if line]
    if len(lines) > TOKENIZER_LINES:  # drawn here: SentencePiece's own draw has no seed
        lines = random.Random(0).sample(lines, TOKENIZER_LINES)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=2**20,  # bytes; it would leave out lines of more than 4,192
            num_threads=1,  # the result depends on the number of threads
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"the texts make no tokenizer of {vocab_size:,} pieces: {str(error).strip()}"
        ) from None
    return model.getvalue()


def encode(texts: Sequence[str], tokenizer: bytes) -> np.ndarray:
    """Join all texts as ``bos text eos``: (N,) uint16."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    ids = [np.empty(0, np.uint16)]
    for start in tqdm(range(0, len(texts), 256), desc="tokens", unit_scale=256, unit="text"):
        for text in pieces.encode(texts[start : start + 256], add_bos=True, add_eos=True):
            ids.append(np.asarray(text, dtype=np.uint16))
    return np.concatenate(ids)


def windows(ids: np.ndarray, length: int, count: int, seed: int) -> Iterator[Tensor]:
    """Cut the stream into windows and deal them in random order, for ever: (count, length + 1).

    Windows that do not fill the last (count, length + 1) of an epoch are left out of it.

    Raises:
        ValueError: There are fewer windows than ``count``.
    """
    starts = np.arange(0, len(ids) - length, length)
    if len(starts) < count:
        raise ValueError(f"{len(ids):,} tokens make {len(starts)} windows of {length}, not {count}")
    draw = np.random.default_rng((seed, length))
    while True:
        order = draw.permutation(starts)
        for i in range(0, len(order) - count + 1, count):
            rows = [ids[start : start + length + 1] for start in order[i : i + count]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def held_out_windows(unseen: np.ndarray) -> int:
    """Count the windows that the held-out loss is measured on."""
    return min(HELD_OUT_WINDOWS, (len(unseen) - 1) // STAGES[0][0])


def batches(ids: np.ndarray, steps: int, tokens: int, seed: int, done: int) -> Iterator[Tensor]:
    """Deal the windows of all stages, those of the first ``done`` steps left out."""
    begin = 0
    for length, share in STAGES:
        end = round(steps * share)
        dealt = windows(ids, length, tokens // length, seed)
        for step in range(begin, end):
            window = next(dealt)
            if step >= done:
                yield window
        begin = end


def learn(model: LlamaForCausalLM, window: Tensor, backward: bool) -> float:
    """Give the mean cross-entropy of the next token, in nats, of a window (B, T + 1).

    The head's logits, (B·T, V) float32, are the largest tensor of all: they are made, and their
    gradient taken, for some tokens at a time.
    """
    size = HEAD_TOKENS_CUDA if window.device.type == "cuda" else HEAD_TOKENS
    ids, wanted = window[:, :-1], window[:, 1:].flatten()
    table = model.model.embed_tokens.weight
    hidden = model.model(ids).flatten(0, 1)  # (B·T, D)
    below = hidden.detach().requires_grad_(backward)
    # The sum stays on the device: .item() in every part would wait for the GPU.
    total = torch.zeros((), device=window.device)
    for part, target in zip(below.split(size), wanted.split(size), strict=True):
        logits = F.linear(part, table.bfloat16()).float()  # (size, V)
        loss = F.cross_entropy(logits, target, reduction="sum") / len(wanted)
        if backward:
            loss.backward()
        total += loss.detach()
    if backward:
        hidden.backward(below.grad)
    return total.item()


def pretrain(
    model: LlamaForCausalLM,
    ids: np.ndarray,
    unseen: np.ndarray,
    *,
    steps: int,
    tokens: int,
    lr: float,
    seed: int,
    folder: Path,
    resume: bool,
) -> list[dict]:
    """Train for some steps of ``tokens`` tokens: warm-up over 5%, then linear decay to 0.

    Leaves the model in bfloat16. Checkpoints go into ``folder``.

    Returns:
        A dictionary every ``LOSS_EVERY`` steps and for the last: step, tokens, loss and held-out
        loss (nats), seconds.

    Raises:
        CheckpointError: The checkpoint is of another training.
        FloatingPointError: The loss is not finite.
    """
    device = next(model.parameters()).device
    masters = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    model.bfloat16()
    model.model.embed_tokens.float()
    cast = model.model.embed_tokens.register_forward_hook(lambda *x: x[-1].bfloat16())
    matrices = [p for n, p in masters.items() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in masters.items() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    identity = {
        "shape": dataclasses.asdict(model.model.config),
        "ids": hash_state("", {"ids": torch.from_numpy(ids.astype(np.int32))}),
        "device": device.type,
        "training": {"steps": steps, "tokens": tokens, "lr": lr, "seed": seed, "stages": STAGES},
    }
    state = State(folder, masters, optimizers, torch.amp.GradScaler(enabled=False), identity)
    log, curve = folder / "curve.json", []
    if resume:
        state.load()
        if state.step:
            curve = [p for p in json.loads(log.read_text()) if p["step"] <= state.step]

    @torch.no_grad()
    def round_masters() -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(masters[name])

    round_masters()
    held_out = next(windows(unseen, STAGES[0][0], held_out_windows(unseen), seed=0))
    warmup = max(1, steps // 20)
    bar = tqdm(
        total=steps * tokens, initial=state.step * tokens, unit="token", unit_scale=True,
        desc="pretraining",
    )  # fmt: skip
    for window in batches(ids, steps, tokens, seed, state.step):
        step = state.step + 1
        share = min(step / warmup, (steps - step + 1) / (steps - warmup + 1))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * share
        loss = learn(model, window.to(device), backward=True)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}: try a lower --lr")
        for name, parameter in model.named_parameters():
            masters[name].grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        round_masters()
        state.step = step
        bar.update(tokens)
        if step % LOSS_EVERY == 0 or step == steps:
            with torch.no_grad():
                validation = learn(model, held_out.to(device), backward=False)
            curve.append(
                {"step": step, "tokens": step * tokens, "loss": round(loss, 4),
                 "held_out": round(validation, 4), "seconds": round(state.elapsed(), 1)}
            )  # fmt: skip
            bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{validation:.3f}")
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(log, json.dumps(curve).encode())
            state.save()
    bar.close()
    cast.remove()
    model.bfloat16()
    return curve


def matmul_rate(device: torch.device, size: int | None = None) -> float:
    """Measure the machine's rate at bfloat16 products of size × size: operations a second.

    By default the size is large enough to fill it.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device).bfloat16()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


@torch.inference_mode()
def share_copied(
    model: LlamaForCausalLM,
    beginnings: Tensor,
    notes: Sequence[list[int]],
    continued: int,
    run: int,
) -> float:
    """Continue beginnings of notes greedily; give the share that repeats what was read.

    Args:
        model: The base.
        beginnings: (N, T) token ids.
        notes: Token ids of all notes that it was trained on.
        continued: Tokens of a continuation.
        run: Tokens in a row that count as a copy, from any of the notes.
    """
    read = {tuple(note[i : i + run]) for note in notes for i in range(len(note) - run + 1)}
    copied = 0
    for part in tqdm(beginnings.split(50), desc="copying", unit="part"):
        for _ in range(continued):
            lengths = torch.full((len(part),), part.size(1), device=part.device)
            states = model.model(part, lengths)  # (B, D)
            logits = F.linear(states, model.model.embed_tokens.weight)  # (B, V)
            part = torch.cat((part, logits.argmax(-1, keepdim=True)), 1)
        for note in part[:, -continued:].tolist():
            copied += any(tuple(note[i : i + run]) in read for i in range(continued - run + 1))
    return copied / len(beginnings)


def loss_figure(curve: Sequence[dict]) -> Figure:
    """Draw the loss on training windows and on held-out texts against the tokens seen."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [point["tokens"] / 1e6 for point in curve]
    axes.plot(tokens, [point["loss"] for point in curve], color=LIGHT, label="training")
    axes.plot(tokens, [p["held_out"] for p in curve], color=BLACK, label="held-out texts")
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
vaers_narratives and neiss_fireworks tell of real people, without their names, as the US Government
published them. The licences' texts stand at creativecommons.org/licenses and
opensource.org/license/mit. The code and these weights are offered under Apache-2.0; those texts
that are CC BY-SA (medical_abstracts, and some of e3c_case_reports and evidence_inference) ask that
what is made from them be shared alike.

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
    """Write a folder that Transformers loads too; weights in bfloat16, the card beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.asdict(model.model.config)
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
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
    weights = {n: p.detach().bfloat16().cpu().contiguous() for n, p in model.named_parameters()}
    rows = (
        f"| {s.name} | {s.origin} | {', '.join(s.licenses)} | {len(s.texts):,} | "
        f"{sum(len(text.split()) for text in s.texts) / 1e6:.2f} | {s.repeats:g} × |"
        for s in sources
    )
    curve = about["curve"]
    hashes = sorted(text_sha256(text) for s in sources[:1] for text in s.texts + s.held_out)
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
        write_atomically(folder / name, data.encode() if isinstance(data, str) else data)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder of *.jsonl.gz files")
    add("--notes", default="mtsamples", help="mtsamples, or a CSV file")
    add("--out", type=Path, required=True, help="folder to write")
    add("--checkpoints", type=Path, default=Path("runs", "pretraining"), help="folder to resume")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--tokens", type=float, default=30e6, help="tokens to train on")
    add("--batch", type=int, default=8192, help="tokens of a step")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    try:
        run_job(args)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(2, f"pretrain_base.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "pretrain_base.py: stopped; the same command with --resume goes on\n")
    return 0


def run_job(args: argparse.Namespace) -> None:
    """Read, train the tokenizer and the model, write both."""
    for name in ("tokens", "batch", "lr"):
        if not 0 < (number := getattr(args, name)) < math.inf:
            raise ValueError(f"--{name} {number}: expected more than 0")
    if wrong := [length for length, _ in STAGES if args.batch % length]:
        raise ValueError(f"--batch {args.batch}: expected a multiple of the windows of {wrong[0]}")
    keep_freed_memory()
    torch.manual_seed(args.seed)
    device = choose_device(args.device)
    sources = read_sources(args.corpus, args.notes, args.seed)
    texts = mix(sources, args.seed)
    print(f"{len(texts):,} texts, {sum(map(len, texts)) / 1e6:.1f} M characters", flush=True)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    path = args.checkpoints / "tokenizer.model"
    if not (args.resume and path.is_file()):
        write_atomically(path, train_tokenizer(texts, SHAPE.vocab_size))
    notes = [Tokenizer(path).encode(text) for text in sources[0].texts]
    enough = COPYING["prompt"] + COPYING["run"]
    beginnings = [note[: COPYING["prompt"]] for note in notes if len(note) >= enough]
    beginnings = beginnings[: COPYING["beginnings"]]
    if not beginnings:
        raise ValueError(f"no note has {enough} tokens: the share copied cannot be measured")
    tokenizer = path.read_bytes()
    ids = encode(texts, tokenizer)
    unseen = encode([text for source in sources for text in source.held_out], tokenizer)
    if held_out_windows(unseen) < 1:
        raise ValueError(
            f"the held-out texts, one in {HELD_OUT} of a source, have {len(unseen)} tokens: "
            f"expected more than {STAGES[0][0]}"
        )
    model = LlamaForCausalLM(SHAPE).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    steps, peak = max(1, int(args.tokens) // args.batch), matmul_rate(device)
    print(f"{len(ids):,} tokens; {parameters:,} parameters; {steps:,} steps", flush=True)
    curve = pretrain(
        model, ids, unseen, steps=steps, tokens=args.batch, lr=args.lr, seed=args.seed,
        folder=args.checkpoints, resume=args.resume,
    )  # fmt: skip
    copied = share_copied(
        model, torch.tensor(beginnings, device=device), notes, COPYING["continued"], COPYING["run"]
    )
    seconds = curve[-1]["seconds"]
    points = itertools.pairwise([{"tokens": 0, "seconds": 0}, *curve])
    # Other work on the machine may have held up some of it.
    rate = statistics.median(
        (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in points
    )
    threads = f"{torch.get_num_threads()} threads of a CPU"
    about = COPYING | {
        "curve": curve,
        "command": f"--notes {Path(args.notes).name} --tokens {int(args.tokens)} "
        f"--batch {args.batch} --lr {args.lr:g} --seed {args.seed}",
        "parameters": parameters,
        "layers": SHAPE.num_hidden_layers,
        "width": SHAPE.hidden_size,
        "vocab": SHAPE.vocab_size,
        "positions": SHAPE.max_position_embeddings,
        "tokens": curve[-1]["tokens"] / 1e6,
        "stream": len(ids) / 1e6,
        "passes": curve[-1]["tokens"] / len(ids),
        "steps": steps,
        "batch": args.batch,
        "minutes": seconds / 60,
        "device": f"one {torch.cuda.get_device_name()}" if device.type == "cuda" else threads,
        "rate": rate,
        "share": 6 * parameters * rate / peak,  # 2 forward, 4 backward, a multiply-add is two
        "peak": peak / 1e9,
        "held_out": curve[-1]["held_out"],
        "windows": held_out_windows(unseen),
        "window": STAGES[0][0],
        "beginnings": len(beginnings),
        "copied": copied,
    }
    write_base(args.out, model, tokenizer, sources, about)
    print(f"{curve[-1]}: {rate:,.0f} tokens a second, {about['share']:.0%} of the matmul rate")


if __name__ == "__main__":
    sys.exit(main())
