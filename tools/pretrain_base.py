"""Train the small medical Llama that is bundled: a tokenizer, then a causal language model.

    python tools/pretrain_base.py --corpus FOLDER --out clinora/bundled/base

The corpus is a folder of ``*.jsonl.gz`` files, a JSON object with a ``text`` on each line.
"""

import argparse
import dataclasses
import gzip
import io
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from clinora.llama import LlamaConfig, LlamaForCausalLM

SHAPE = LlamaConfig(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=2,  # few wide heads: the cost of attention grows with their number
    num_key_value_heads=1,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)

# How often a source is read. Those that read like notes count more than articles and leaflets.
REPEATS = {
    "acibench_notes": 6,
    "primock57_notes": 6,
    "trec_patient_topics": 6,
    "medec_ms": 6,
    "e3c_case_reports": 3,
    "roco_captions": 3,
    "casimedicos": 2,
    "vaers_narratives": 2,
    "docsref_im_guide": 2,
    "medical_abstracts": 1,
    "pubmedqa": 1,
    "fda_label_sections": 1,
    "openstax": 0.5,
    "neiss_fireworks": 0.5,
    "medquad": 0.2,
    "evidence_inference": 0.1,
}


def read_corpus(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    """Read all texts, each source as often as REPEATS says (1 if unnamed), shuffled by seed.

    Returns:
        Texts to train on, and a hundredth of each source that is not among them.
    """
    files = sorted(folder.glob("*.jsonl.gz"))
    if not files:
        raise FileNotFoundError(f"no *.jsonl.gz file in {folder}")
    draw = random.Random(seed)
    texts, held_out = [], []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            source = [json.loads(line)["text"] for line in lines]
        draw.shuffle(source)
        held_out += source[: len(source) // 100]
        source = source[len(source) // 100 :]
        repeats = REPEATS.get(file.name.removesuffix(".jsonl.gz"), 1)
        texts += source * int(repeats)
        texts += draw.sample(source, round(len(source) * (repeats % 1)))
    draw.shuffle(texts)
    draw.shuffle(held_out)
    return texts, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """Train a BPE SentencePiece model with Llama's conventions; returns the file's bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
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
        input_sentence_size=200_000,
        shuffle_input_sentence=True,
        num_threads=1,  # the result depends on the number of threads
        minloglevel=2,
    )
    return model.getvalue()


def encode(texts: list[str], tokenizer: bytes) -> np.ndarray:
    """Join all texts as ``bos text eos``: (N,) uint16."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    ids = []
    for start in tqdm(range(0, len(texts), 256), desc="tokens", unit_scale=256, unit="text"):
        for text in pieces.encode(texts[start : start + 256], add_bos=True, add_eos=True):
            ids.append(np.asarray(text, dtype=np.uint16))
    return np.concatenate(ids)


def batches(ids: np.ndarray, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Cut the stream into windows and deal them in random order, for ever: (B, T + 1)."""
    starts = np.arange(0, len(ids) - length - 1, length)
    shuffled = np.random.default_rng(seed)
    while True:
        order = shuffled.permutation(starts)
        for i in range(0, len(order) - batch + 1, batch):
            windows = [ids[s : s + length + 1] for s in order[i : i + batch]]
            yield torch.from_numpy(np.stack(windows).astype(np.int64))


def loss_of(model: LlamaForCausalLM, window: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats, under bfloat16 autocast; (B, T + 1) → ()."""
    with torch.autocast(window.device.type, dtype=torch.bfloat16):
        logits = model(window[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def pretrain(
    model: LlamaForCausalLM,
    ids: np.ndarray,
    unseen: np.ndarray,
    *,
    tokens: int,
    batch: int,
    lr: float,
    seed: int,
) -> list[dict]:
    """Train on ``tokens`` tokens: linear warm-up over 5% of the steps, then linear decay to 0.

    Returns:
        A dictionary for each 50th step and the last: step, tokens, loss and held-out loss (nats).
    """
    device = next(model.parameters()).device
    length = model.model.config.max_position_embeddings
    held_out = next(batches(unseen, 32, length, seed=0)).to(device)
    optimizers = make_optimizers(model, lr)
    steps = max(1, tokens // (batch * length))
    warmup = max(1, steps // 20)
    curve, windows = [], batches(ids, batch, length, seed)
    bar = tqdm(total=steps * batch * length, unit="token", unit_scale=True, desc="pretraining")
    for step in range(1, steps + 1):
        share = min(step / warmup, (steps - step + 1) / (steps - warmup + 1))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * share
        loss = loss_of(model, next(windows).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.update(batch * length)
        if step % 50 == 0 or step == steps:
            with torch.no_grad():
                validation = loss_of(model, held_out).item()
            point = {"step": step, "tokens": step * batch * length}
            curve.append(point | {"loss": round(loss.item(), 4), "held_out": round(validation, 4)})
            bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{validation:.3f}")
    bar.close()
    return curve


def write_base(folder: Path, model: LlamaForCausalLM, tokenizer: bytes, curve: list[dict]) -> None:
    """Write a folder that Transformers loads too: config, bfloat16 weights, tokenizer, curve."""
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
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    weights = {n: p.bfloat16().contiguous() for n, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lines = "".join(json.dumps(point) + "\n" for point in curve)
    (folder / "pretraining.jsonl").write_text(lines, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.jsonl.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=float, default=16e6, help="tokens to train on")
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 tokens to a step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    texts, unseen = read_corpus(args.corpus, args.seed)
    print(f"{len(texts):,} texts, {sum(len(text) for text in texts) / 1e6:.1f} M characters")
    tokenizer = train_tokenizer(texts, SHAPE.vocab_size)
    ids, unseen = encode(texts, tokenizer), encode(unseen, tokenizer)
    model = LlamaForCausalLM(SHAPE).to(args.device)
    print(f"{len(ids):,} tokens; {sum(p.numel() for p in model.parameters()):,} parameters")
    began = time.perf_counter()
    options = {"tokens": int(args.tokens), "batch": args.batch, "lr": args.lr, "seed": args.seed}
    curve = pretrain(model, ids, unseen, **options)
    seconds = time.perf_counter() - began
    write_base(args.out, model, tokenizer, curve)
    print(f"{curve[-1]} in {seconds:.0f} s: {curve[-1]['tokens'] / seconds:,.0f} tokens a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
