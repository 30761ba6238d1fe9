"""Train the small medical Llama that is bundled: a tokenizer, then a causal language model.

    python -m tools.pretrain_base --corpus FOLDER --notes mtsamples --out clinora/bundled/base

The corpus is a folder of ``*.jsonl.gz`` files; each line is a JSON object with ``text`` and
``license``. Only the training split of the notes is read; the hashes of the notes that were read
are written into the output folder. If the file of the notes has ``sample_name`` and
``description``, these follow each note, so that the model learns to say what a note is about. The
specialty never follows. ``--resume`` continues from the last checkpoint, on a CPU with the same
bits.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from clinora.checkpoint import write_atomically
from clinora.device import choose_device, keep_freed_memory
from clinora.llama import LlamaConfig, LlamaForCausalLM
from clinora.tokenizer import Tokenizer
from tools.pretraining import card, corpus, loop, tokenizer

SHAPE = LlamaConfig(
    vocab_size=4096,
    hidden_size=320,
    intermediate_size=896,
    num_hidden_layers=6,
    num_attention_heads=4,  # few and wide, because the cost of attention grows with their number
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder of *.jsonl.gz files")
    add("--notes", default="mtsamples", help="mtsamples or a file")
    add("--out", type=Path, required=True, help="folder to write to")
    add(
        "--checkpoints",
        type=Path,
        default=Path("runs", "pretraining"),
        help="folder of the checkpoints",
    )
    add("--resume", action="store_true", help="resume from the last checkpoint")
    add("--tokens", type=float, default=30e6, help="number of tokens to train on")
    add("--batch", type=int, default=8192, help="tokens per step")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=0, help="seed of the weights, the texts and their order")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    try:
        run_job(args)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(2, f"pretrain_base.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "pretrain_base.py: stopped; to resume, add --resume\n")
    return 0


def run_job(args: argparse.Namespace) -> None:
    """Read the texts, train the tokenizer and the model, and write both with the model card."""
    check_options(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    device = choose_device(args.device)
    sources = corpus.read_sources(args.corpus, args.notes, args.seed)
    texts = corpus.mix(sources, args.seed)
    characters = sum(len(text) for text in texts)
    print(f"{len(texts):,} texts, {characters / 1e6:.1f} M characters", flush=True)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    path = args.checkpoints / "tokenizer.model"
    if not args.resume and any(args.checkpoints.glob("step-*.safetensors")):
        raise ValueError(
            f"{args.checkpoints} holds an earlier pretraining: add --resume, or choose another "
            "folder with --checkpoints"
        )
    is_trained = args.resume and path.is_file()
    if not is_trained:
        write_atomically(path, tokenizer.train_tokenizer(texts, SHAPE.vocab_size))
    pieces = path.read_bytes()
    notes = [Tokenizer(path).encode(text) for text in sources[0].texts]
    beginnings = choose_beginnings(notes)
    ids = tokenizer.encode(texts, pieces)
    held_out = []
    for source in sources:
        held_out += source.held_out
    unseen = tokenizer.encode(held_out, pieces)
    if loop.held_out_windows(unseen) < 1:
        raise ValueError(
            f"the held-out texts, one in {corpus.HELD_OUT} of each source, have {len(unseen)} "
            f"tokens: expected more than {loop.STAGES[0][0]}"
        )
    model = LlamaForCausalLM(SHAPE).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    steps = max(1, int(args.tokens) // args.batch)
    peak = loop.matmul_rate(device)
    print(f"{len(ids):,} tokens; {parameters:,} parameters; {steps:,} steps", flush=True)
    curve = loop.pretrain(
        model, ids, unseen, steps=steps, tokens=args.batch, lr=args.lr, seed=args.seed,
        folder=args.checkpoints, resume=args.resume,
    )  # fmt: skip
    copied = card.share_copied(
        model,
        torch.tensor(beginnings, device=device),
        notes,
        card.COPYING["continued"],
        card.COPYING["run"],
    )
    last = curve[-1]
    rate = card.token_rate(curve)
    # For each parameter and token 2 operations forward and 4 backward: a multiply-add is two.
    share = 6 * parameters * rate / peak
    about = card.COPYING | {
        "curve": curve,
        "command": f"--notes {Path(args.notes).name} --tokens {int(args.tokens)} "
        f"--batch {args.batch} --lr {args.lr:g} --seed {args.seed}",
        "parameters": parameters,
        "layers": SHAPE.num_hidden_layers,
        "width": SHAPE.hidden_size,
        "vocab": SHAPE.vocab_size,
        "positions": SHAPE.max_position_embeddings,
        "tokens": last["tokens"] / 1e6,
        "stream": len(ids) / 1e6,
        "passes": last["tokens"] / len(ids),
        "steps": steps,
        "batch": args.batch,
        "minutes": last["seconds"] / 60,
        "device": describe_device(device),
        "rate": rate,
        "share": share,
        "peak": peak / 1e9,
        "held_out": last["held_out"],
        "windows": loop.held_out_windows(unseen),
        "window": loop.STAGES[0][0],
        "beginnings": len(beginnings),
        "copied": copied,
    }
    card.write_base(args.out, model, pieces, sources, about)
    print(f"{last}: {rate:,.0f} tokens a second, {share:.0%} of the matmul rate")


def check_options(args: argparse.Namespace) -> None:
    """Check the numbers in the options.

    Raises:
        ValueError: A number is not above 0, or a batch is not a whole number of windows.
    """
    for name in ("tokens", "batch", "lr"):
        number = getattr(args, name)
        if not 0 < number < math.inf:
            raise ValueError(f"--{name} {number}: expected more than 0")
    for length, _ in loop.STAGES:
        if args.batch % length != 0:
            raise ValueError(
                f"--batch {args.batch}: expected a multiple of the windows of {length}"
            )


def choose_beginnings(notes: list[list[int]]) -> list[list[int]]:
    """Choose the beginnings of notes, as token ids, for measuring copying.

    Raises:
        ValueError: Every note is too short.
    """
    prompt = card.COPYING["prompt"]
    enough = prompt + card.COPYING["run"]
    beginnings = [note[:prompt] for note in notes if len(note) >= enough]
    if not beginnings:
        raise ValueError(f"no note has {enough} tokens: the share copied cannot be measured")
    return beginnings[: card.COPYING["beginnings"]]


def describe_device(device: torch.device) -> str:
    """Describe the device for the model card."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} threads of a CPU"


if __name__ == "__main__":
    sys.exit(main())
