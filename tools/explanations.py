"""Compare two explanations of a prediction: leaving parts out, and gradient × input.

    python -m tools.explanations --notes bundled
    python -m tools.explanations --notes mtsamples

It measures the notes that the run has not seen and that have at least four parts, where a part is a
sentence or a few neighbouring sentences (``clinora.explain.parts_of``). Each method gives each part
a score: the higher, the more the part supports the predicted class. The top part has the highest
score. With p the probability of the predicted class, in points, the columns are:

- signs right: the share of the parts whose score is above 0 if p falls when this part is left out,
  and below 0 if p rises.
- top part right: the share of the notes whose top part is the one without which p falls most.
- top 1, 2 and 3 left out: how far p falls on average when these parts are left out together.
- top part alone: the share of the notes whose top part alone has the same predicted class.

The scores of leave-one-out are the falls of p. So the columns for one part hold for it by
construction, and the test of it are those for two and three parts, and for the top part alone.
"""

import argparse
import bisect
import itertools
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import clinora
from clinora.device import keep_freed_memory
from clinora.evaluation import bootstrap_mean
from clinora.explain import effects, parts_of, variants
from clinora.notes import ordinary_case
from tools.unseen_notes import unseen_notes

LEAVE_ONE_OUT = "leave one out"
GRADIENT = "gradient × input"
RANDOM = "random order"
METHODS = (LEAVE_ONE_OUT, GRADIENT, RANDOM)
SHARES = ("signs right", "top part right", "top part alone")
FALLS = ("top 1 left out", "top 2 left out", "top 3 left out")
FEWEST_PARTS = 4  # so that there is text left without three of them


def gradient_times_input(classifier: clinora.Classifier, parts: Sequence[str]) -> np.ndarray:
    """Give the score of each part of a note by its gradient: the sum over its tokens of e · ∂z/∂e.

    e is the token's embedding and z = ln(p / (1 − p)) the log-odds of the predicted class. To first
    order, e · ∂z/∂e is what z loses when e becomes 0 (Shrikumar et al. 2016).
    """
    text = ordinary_case("".join(parts))  # as the classifier reads it; no character more or less
    ids = classifier.tokenizer.encode(text, classifier.token_limit)
    places = classifier.tokenizer.places(text, classifier.token_limit)
    ends = list(itertools.accumulate(len(part) for part in parts))
    sums = np.zeros(len(parts))
    in_front = len(classifier.tokenizer.first)  # tokens that are no part of the note
    of_tokens = score_tokens(classifier, ids)
    for score, (begin, end) in zip(of_tokens[in_front:], places[in_front:], strict=True):
        # A token may begin with the space after the part before: its last character decides.
        last_character = max(begin, end - 1)
        sums[bisect.bisect(ends, last_character)] += score
    return sums


def score_tokens(classifier: clinora.Classifier, ids: Sequence[int]) -> list[float]:
    """Give e · ∂z/∂e of each token, in nats: T floats."""
    model = classifier.model.eval()
    device = model.score.weight.device
    kept = []  # the embeddings, which the gradient is taken of

    def keep(_module: nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
        kept.append(embedded.detach().requires_grad_())  # (1, T, D)
        return kept[0]

    hook = model.model.embed_tokens.register_forward_hook(keep)
    try:
        with classifier.autocast():
            lengths = torch.tensor([len(ids)], device=device)
            logits = model(torch.tensor([ids], device=device), lengths)[0].float()  # (C,)
    finally:
        hook.remove()
    predicted = logits.argmax()
    # ln(p / (1 − p)) = logit of the predicted class − logsumexp of the other logits.
    others = torch.cat((logits[:predicted], logits[predicted + 1 :]))
    log_odds = logits[predicted] - others.logsumexp(0)
    (gradient,) = torch.autograd.grad(log_odds, kept)
    return (gradient * kept[0].detach()).float().sum(-1)[0].tolist()


def measure_note(
    classifier: clinora.Classifier, parts: Sequence[str], draw: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Measure every method on one note.

    Returns:
        For each method, the value of each column.
    """
    whole, *without = classifier(variants(parts))
    of_parts = effects(parts, [whole, *without])
    fall = np.array([part.effect for part in of_parts])  # (parts,)
    scores = {
        LEAVE_ONE_OUT: fall,
        GRADIENT: gradient_times_input(classifier, parts),
        RANDOM: draw.permutation(len(parts)) - (len(parts) - 1) / 2,
    }
    found = {}
    for method, score in scores.items():
        ranked = np.argsort(-score, kind="stable")
        texts = [parts[ranked[0]]]
        for removed in range(1, FEWEST_PARTS):
            kept = sorted(ranked[removed:])
            texts.append("".join(parts[i] for i in kept))
        alone, *rest = classifier(texts)
        found[method] = {
            "signs right": float(np.mean(np.sign(score) == np.sign(fall))),
            "top part right": float(ranked[0] == fall.argmax()),
            "top part alone": float(alone.index == whole.index),
        }
        for column, prediction in zip(FALLS, rest, strict=True):
            p = prediction.probabilities[whole.index]
            found[method][column] = 100 * (whole.probabilities[whole.index] - p)
    return found


def compare(args: argparse.Namespace) -> None:
    """Measure the notes one by one, then print the table and the differences."""
    if args.sample is not None and args.sample < 1:
        raise ValueError(f"--sample is {args.sample}: expected 1 or more")
    classifier = clinora.Classifier.load(
        args.run, base=args.base, device=args.device, precision=args.precision
    )
    draw = np.random.default_rng(0)
    measured = []
    found = []
    for note in unseen_notes(classifier, args)[: args.sample]:
        parts = parts_of(classifier, note.text)
        if len(parts) < FEWEST_PARTS:
            continue
        measured.append(note)
        found.append(measure_note(classifier, parts, draw))
    if not measured:
        raise ValueError(
            f"{args.notes} has no note with at least {FEWEST_PARTS} sentences that {args.run} has "
            "not seen: give other notes with --notes"
        )
    print_table(measured, found)


def print_table(notes: Sequence[clinora.Note], found: Sequence[dict]) -> None:
    """Print the mean of each method and column over the notes, and how two methods differ."""
    columns = (*SHARES[:2], *FALLS, *SHARES[2:])
    values = {}  # of each method and column, one for each note
    for method in METHODS:
        for column in columns:
            values[method, column] = np.array([of_note[method][column] for of_note in found])
    print(f"| {len(notes)} notes | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for method in METHODS:
        cells = []
        for column in columns:
            mean = values[method, column].mean()
            cells.append(f"{mean:.1%}" if column in SHARES else f"{mean:.1f}")
        if method == RANDOM:
            cells[columns.index("signs right")] = ""  # a random order has no signs
        print(f"| {method} | {' | '.join(cells)} |")
    print(f"\n{LEAVE_ONE_OUT} minus {GRADIENT}, paired, in points, with 95% intervals:")
    for column in ("top 2 left out", "top 3 left out", "top part alone"):
        difference = values[LEAVE_ONE_OUT, column] - values[GRADIENT, column]
        points = difference * 100 if column in SHARES else difference
        gain = bootstrap_mean(points, notes)
        print(f"- {column}: {gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", default="bundled", help="bundled, or a run's folder")
    add("--base", help="the base model, if it has moved (default: the run's)")
    add("--notes", default="bundled", help="bundled, mtsamples or a file")
    add("--text-column", help="column of the texts (default: that of the run or named notes)")
    add("--label-column", help="column of the labels (default: that of the run or named notes)")
    add("--sample", type=int, help="measure so many notes only (default: all)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        compare(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"explanations.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "explanations.py: stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
