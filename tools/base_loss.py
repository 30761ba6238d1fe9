"""Measure how well a base predicts the tokens of notes before any fine-tuning.

    python -m tools.base_loss --base smollm2 --notes mtsamples

For each split: the mean loss of its notes, in nats a token, where a note's loss is the mean of
−log p(token | the tokens before) over its tokens. A base that was pretrained on a crawl of the web
may have read public notes. A lower loss on training than on test notes would say that it has read
the former and not the latter. Equal losses do not say that it has read neither.

Shapes: T tokens, V vocabulary.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import clinora
from clinora.checkpoint import find_tokenizer
from clinora.classifier import TOKEN_LIMIT
from clinora.device import choose_device, choose_dtype, keep_freed_memory
from clinora.evaluation import bootstrap_mean
from clinora.notes import LABEL_COLUMN, SIDES, TEXT_COLUMN


@torch.inference_mode()
def loss_of(model: clinora.LlamaForCausalLM, ids: Sequence[int]) -> float:
    """Give the mean loss of all tokens of a text except the first, in nats a token."""
    tokens = torch.tensor(ids, device=model.model.embed_tokens.weight.device)  # (T,)
    logits = model(tokens[None, :-1])  # (1, T − 1, V)
    return F.cross_entropy(logits[0].float(), tokens[1:]).item()


def measure(args: argparse.Namespace) -> None:
    """Print the table."""
    if args.sample < 1:
        raise ValueError(f"--sample is {args.sample}: expected 1 or more")
    notes = clinora.read_notes(
        args.notes,
        text_column=args.text_column,
        label_column=args.label_column,
        split_column=args.split_column,
    )
    tokenizer = clinora.Tokenizer(find_tokenizer(args.base))
    device = choose_device(args.device)
    dtype = choose_dtype(device, args.precision)
    model = clinora.load_model(args.base, dtype=dtype, device=device).eval()
    positions = model.model.config.max_position_embeddings
    if not 2 <= args.token_limit <= positions:
        raise ValueError(
            f"--token-limit is {args.token_limit}: expected 2 to {positions}, the positions that "
            "the base was trained for"
        )
    print("| split | notes | tokens | nats a token | 95% interval |\n|---|---:|---:|---:|---:|")
    for side in SIDES:
        chosen = sorted(notes.on(side), key=lambda note: note.sha256)[: args.sample]
        if not chosen:
            continue
        ids = [tokenizer.encode(note.text, args.token_limit) for note in chosen]
        if min(map(len, ids)) < 2:
            raise ValueError(f"a {side} note has one token: expected two or more")
        losses = np.array([loss_of(model, note) for note in tqdm(ids, desc=side, unit="notes")])
        mean = bootstrap_mean(losses, chosen)
        tokens = sum(len(note) - 1 for note in ids)
        print(
            f"| {side} | {len(chosen)} | {tokens:,} | {mean.value:.3f} | {mean.low:.3f} to "
            f"{mean.high:.3f} |",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default="bundled", help="bundled, smollm2, a folder or a Hub id")
    add("--notes", default="bundled", help="bundled, mtsamples, a file or a folder")
    add("--text-column", default=TEXT_COLUMN, help="column of the texts")
    add("--label-column", default=LABEL_COLUMN, help="column of the labels")
    add("--split-column", help="column that gives the split of each row")
    add("--token-limit", type=int, default=TOKEN_LIMIT, help="tokens read of a note")
    add("--sample", type=int, default=100, help="most notes of a split, chosen by their hashes")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        measure(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"base_loss.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
