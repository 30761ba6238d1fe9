"""A user's whole task: train LoRA on the notes for an epoch and test the adapter.

    python -m benchmarks.job [--notes mtsamples.csv] [--epochs 1] [--sample 200]

Theirs is Transformers' Trainer with PEFT as documented: bf16 if the processor has it, dynamic
padding, a batch of 16. Ours is train.py's loop with as many notes in each step. Both have the same
base, ids, LoRA, peak learning rate, warm-up and cosine. For a note with several labels, ours trains
on all of them and theirs on the first. A prediction is correct if it is one of the note's labels.
Each repetition trains new adapters on both sides.

Ours keeps freed memory, as train.py does; theirs uses the C library's default.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

import clinora
from benchmarks import common
from clinora.checkpoint import find_tokenizer
from clinora.device import keep_freed_memory
from clinora.notes import Note, are_correct


def train_theirs(
    args: argparse.Namespace, base: str, labels: int, ids: list[list[int]], notes: Sequence[Note]
) -> tuple[int, float, torch.nn.Module]:
    """Train with the Trainer; give the number of notes that it saw, its seconds and the model."""
    import transformers

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(notes)

        def __getitem__(self, i: int) -> dict:
            return {"input_ids": ids[i], "label": notes[i].labels[0]}

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        tokens, lengths = common.pad([row["input_ids"] for row in rows], torch.device("cpu"))
        mask = (torch.arange(tokens.size(1)) < lengths[:, None]).long()
        target = torch.tensor([row["label"] for row in rows])
        return {"input_ids": tokens, "attention_mask": mask, "labels": target}

    model = common.their_model(base, labels)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=args.batch,
                num_train_epochs=args.epochs,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=math.ceil(0.1 * args.epochs * math.ceil(len(notes) / args.batch)),
                weight_decay=0.01,
                bf16=common.compute_dtype() == torch.bfloat16,
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
            ),
            data_collator=collate,
            train_dataset=Rows(),
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return len(notes) * args.epochs, seconds, model


@torch.inference_mode()
def their_accuracy(model: torch.nn.Module, ids: list[list[int]], notes: Sequence[Note]) -> float:
    """Give the any-label accuracy of their model."""
    predicted = []
    model.eval()
    for note in ids:
        with common.autocast():
            predicted.append(model(input_ids=torch.tensor([note])).logits.argmax().item())
    return any_label_accuracy(predicted, notes)


def any_label_accuracy(predicted: Sequence[int], notes: Sequence[Note]) -> float:
    """Give the share of notes whose predicted class is one of their labels."""
    return float(are_correct(notes, predicted).mean())


def measure_side(args: argparse.Namespace) -> dict:
    """Train a new adapter on one side; give its seconds per note, accuracy and counts."""
    notes = clinora.read_notes(args.notes)
    training = notes.on("training")[: args.sample]
    test = notes.on("test")
    labels = len(notes.classes)
    tokenizer = clinora.Tokenizer(find_tokenizer(args.base))
    ids = [tokenizer.encode(note.text, args.token_limit) for note in training]
    steps = args.epochs * math.ceil(len(training) / args.batch)
    if args.side == "ours":
        keep_freed_memory()  # as train.py does
        model = common.our_model(args.base, labels)
        ours = clinora.Classifier(model, tokenizer, notes.classes, args.token_limit)
        seen, seconds = common.train_ours(ours, training, steps, args.batch, args.learning_rate)
        predictions = ours([note.text for note in test])
        accuracy = any_label_accuracy([prediction.index for prediction in predictions], test)
    else:
        seen, seconds, model = train_theirs(args, args.base, labels, ids, training)
        test_ids = [tokenizer.encode(note.text, args.token_limit) for note in test]
        accuracy = their_accuracy(model, test_ids, test)
    return {
        "seconds": seconds / seen,
        "accuracy": accuracy,
        "notes": len(training),
        "steps": steps,
        "test": len(test),
    }


def measure(args: argparse.Namespace) -> None:
    """Train both sides in turns, each in its own process, and compare."""
    words = common.words_of(args, "repetitions", "side")
    results = {"ours": [], "theirs": []}
    for _ in range(args.repetitions):
        for side, found in results.items():
            found.append(common.in_own_process("benchmarks.job", *words, "--side", side))
    seconds = {}
    rows = []
    for side, found in results.items():
        seconds[side] = [result["seconds"] for result in found]
        notes_per_second = 1 / statistics.median(seconds[side])
        accuracy = common.spread([result["accuracy"] for result in found])
        rows.append([side, f"{notes_per_second:.1f}", accuracy])
    common.table(["", "notes/s", "any-label accuracy"], rows)
    first = results["ours"][0]
    print(f"{first['notes']} notes, {first['steps']} steps of ours, {first['test']} test notes")
    print(f"times faster than theirs: {common.spread(common.ratios(seconds))}")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("--base", default="bundled", help="bundled, or a folder")
    parser.add_argument("--notes", default="bundled", help="bundled, mtsamples or a file")
    parser.add_argument("--sample", type=int, help="number of training notes (default: all)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training notes")
    parser.add_argument("--batch", type=int, default=16, help="notes that a step learns from")
    parser.add_argument("--token-limit", type=int, default=512, help="tokens read of a note")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    common.begin(args)
    if args.side:
        print(json.dumps(measure_side(args)))
    else:
        measure(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
