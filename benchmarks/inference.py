"""Inference: notes per second on the test notes, or the time of one note and its products.

    python -m benchmarks.inference [--notes mtsamples.csv] [--sample 100] [--batch 8 16 32]
    python -m benchmarks.inference --one-note FOLDER [--tokens 500] [--layers 4]

Theirs is Transformers' text-classification pipeline with the same tokens and the same adapter,
merged on both sides. It runs with each of the numbers of notes in --batch (its own default is 1),
and is compared at its fastest.

Ours keeps freed memory, as eval.py does; theirs uses the C library's default.
"""

import argparse
import json
import statistics
import sys
import time

import torch

import clinora
from benchmarks import common
from clinora.device import keep_freed_memory


def their_pipeline(run: str, classifier: clinora.Classifier, batch: int) -> object:
    """Make a pipeline from the run's base and adapter, merged by PEFT."""
    import peft
    import transformers
    from tokenizers import Tokenizer, processors

    from clinora.checkpoint import BUNDLED, find_tokenizer
    from tools.make_token_ids import build

    folder = BUNDLED / "adapter" if run == "bundled" else run
    base = classifier.model.source.folder
    model = common.their_model(str(base), len(classifier.labels), adapt=False)
    model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    file = find_tokenizer(base)
    if file.suffix == ".json":
        tokens = Tokenizer.from_file(str(file))
    else:
        tokens = build(file)
        bos = ("<s>", tokens.token_to_id("<s>"))
        tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token=tokens.id_to_token(0), padding_side="right"
    )
    limits = {"truncation": True, "max_length": classifier.token_limit}
    pipe = transformers.pipeline(
        "text-classification", model=model.eval(), tokenizer=tokenizer, batch_size=batch, device=-1
    )
    return lambda texts: pipe(texts, **limits)


def measure_side(args: argparse.Namespace) -> dict:
    """Time one side on the test notes, after a pass that is not timed; give its predictions too."""
    notes = clinora.read_notes(args.notes).on("test")[: args.sample]
    texts = [note.text for note in notes]
    classifier = clinora.Classifier.load(args.run, device="cpu")
    if args.side == "ours":
        keep_freed_memory()  # as eval.py does
        clinora.merge_lora(classifier.model)

        def predict() -> list[int]:
            return [prediction.index for prediction in classifier(texts)]
    else:
        (batch,) = args.batch
        pipe = their_pipeline(args.run, classifier, batch)

        def predict() -> list[int]:
            return [int(row["label"].removeprefix("LABEL_")) for row in pipe(texts)]

    predict()
    began = time.perf_counter()
    predicted = predict()
    return {"seconds": time.perf_counter() - began, "predicted": predicted}


def measure_notes(args: argparse.Namespace) -> None:
    """Time both sides in turns, each in its own process."""
    words = common.words_of(args, "repetitions", "side", "batch", "one_note", "tokens", "layers")
    sides = {"ours": ["--side=ours"]}
    for batch in args.batch:
        sides[f"theirs, batches of {batch}"] = ["--side=theirs", f"--batch={batch}"]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    predicted = {}
    for _ in range(args.repetitions):
        for side, options in sides.items():
            result = common.in_own_process("benchmarks.inference", *words, *options)
            seconds[side].append(result["seconds"])
            predicted[side] = result["predicted"]
    notes = len(predicted["ours"])
    rows = []
    for side, times in seconds.items():
        rows.append([side, f"{notes / statistics.median(times):.1f}"])
    common.table(["", "notes/s"], rows)
    _, *theirs = sides
    fastest = min(theirs, key=lambda side: statistics.median(seconds[side]))
    pairs = zip(predicted["ours"], predicted[fastest], strict=True)
    same = sum(ours == theirs for ours, theirs in pairs)
    print(f"the same predicted class for {same} of {notes} notes")
    times = common.spread(common.ratios(seconds, "ours", fastest))
    print(f"times faster than theirs at its fastest: {times}")


def measure_one(args: argparse.Namespace) -> None:
    """Time one note on both sides, and the products of its linear layers alone."""
    ours = common.our_model(args.one_note, 5, args.layers, adapt=False).eval()
    theirs = common.their_model(args.one_note, 5, args.layers, adapt=False).eval()
    ids, lengths = common.equal_batch(1, args.tokens, 2000)

    @torch.inference_mode()
    def run() -> None:
        with common.autocast():
            ours(ids, lengths)

    @torch.inference_mode()
    def their_run() -> None:
        theirs(input_ids=ids)

    products = common.Products(ours, run, backward=False)
    seconds = common.alternate(
        {"ours": run, "theirs": their_run, "alone": products.compute}, args.repetitions
    )
    rows = [[name, f"{statistics.median(times):.3f}"] for name, times in seconds.items()]
    common.table(["", "seconds a note"], rows)
    times = common.ratios(seconds, "alone", "ours")
    print(f"ours takes {common.spread(times)} of the time of its products alone")
    print(f"times faster than theirs: {common.spread(common.ratios(seconds))}")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("--run", default="bundled", help="bundled, or a run's folder")
    parser.add_argument("--notes", default="bundled", help="bundled, mtsamples or a file")
    parser.add_argument("--sample", type=int, help="number of test notes (default: all)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[8, 16, 32], help="notes in the pipeline's batches"
    )
    parser.add_argument("--one-note", metavar="FOLDER", help="time one note on this base instead")
    parser.add_argument("--tokens", type=int, default=500, help="tokens of the one note")
    parser.add_argument("--layers", type=int, help="layers of that base to keep (default: all)")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    common.begin(args)
    if args.side:
        print(json.dumps(measure_side(args)))
        return 0
    if args.one_note:
        measure_one(args)
    else:
        measure_notes(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
