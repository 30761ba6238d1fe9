"""Checks of the exercises: ``check("3.1", answer)`` prints "Correct" or "Not yet".

Each check computes the answer in another way than the chapter's folded answer does. A blank is
``...``. An answer of a wrong type or shape is not correct yet; other errors, such as an unknown
variable in a function, are raised.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import clinora


def check(exercise: str, answer: object) -> None:
    """Print "Correct" if the answer of an exercise is correct, else "Not yet"."""
    print("Correct" if is_correct(exercise, answer) else "Not yet")


def is_correct(exercise: str, answer: object) -> bool:
    """Tell whether an answer is correct; a blank, or one of a wrong type or shape, is not."""
    try:
        return bool(CHECKS[exercise](answer))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, ArithmeticError):
        return False


# --- Chapter 1: a Llama layer ---------------------------------------------------------------------


def _layer_parameters(answer: Callable[[int, int, int, int, int], int]) -> bool:
    """The sum over the nine weights; in the second shape H·E is not D."""
    for D, H, K, E, I in ((320, 4, 2, 80, 896), (48, 4, 2, 10, 100)):  # noqa: E741
        shapes = [(H * E, D), (K * E, D), (K * E, D), (D, H * E), (I, D), (I, D), (D, I)]
        if answer(D, H, K, E, I) != sum(out * width for out, width in shapes) + D + D:
            return False
    return True


def _slowest_turn(answer: float) -> bool:
    """The slowest of the 40 pairs turns by 10,000^(−78/80) radians a token."""
    return _close(answer, 6.283185307 / 10_000 ** (-78 / 80), 1e-3)


def _uniform_attention(answer: Callable[[Tensor], Tensor]) -> bool:
    """Each token's output is the mean of the values up to its own."""
    (values,) = _random((5, 3))
    means = torch.stack([values[: t + 1].mean(0) for t in range(5)])
    return _close(answer(values), means, 1e-6)


def _padded_batch(answer: Callable[[list[list[int]]], tuple[Tensor, Tensor]]) -> bool:
    """Padding follows each note, and the lengths are those of the notes."""
    notes = [[1, 5, 9], [1, 7], [1, 8, 6, 4]]
    ids, lengths = answer(notes)
    if list(lengths) != [3, 2, 4]:
        return False
    # What stands after a note does not matter.
    return all(row[: len(note)].tolist() == note for row, note in zip(ids, notes, strict=True))


# --- Chapter 2: why a low rank can be enough ------------------------------------------------------


def _largest_rank(answer: Callable[[int, int], int]) -> bool:
    """The largest r with r·(rows + columns) < rows·columns, found by trying every rank."""
    for rows, columns in ((320, 320), (2048, 2048), (2048, 5632), (30, 7), (12, 6), (4, 4)):
        saves = [r for r in range(rows) if r * (rows + columns) < rows * columns]
        if answer(rows, columns) != max(saves):
            return False
    return True


def _error_of_best_approximation(answer: Callable[[Tensor, int], object]) -> bool:
    """The Frobenius norm of what a best approximation leaves, from the matrices themselves."""
    matrix = torch.randn(12, 9, generator=_generator(0), dtype=torch.float64)
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (0, 3, 8):
        left = matrix - U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]
        if not _close(answer(sigma, rank), left.norm(), 1e-6):
            return False
    return True


def _share_in_noise(answer: float) -> bool:
    """The share of ‖M‖² in the 8 largest of 320 singular values, for a random M: about 9%."""
    return 0.085 < answer < 0.1


# --- Chapter 3: LoRA by hand ----------------------------------------------------------------------


def _merged_weight(answer: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> bool:
    """What the merged weight does to x is what the layer did, and W is unchanged."""
    W, A, B, x = _random((5, 6), (2, 6), (5, 2), (6,))
    before = W.clone()
    merged = answer(W, A, B, 3)
    return torch.equal(W, before) and _close(merged @ x, before @ x + 1.5 * (B @ (A @ x)), 1e-6)


def _gradients(answer: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """The gradients that autograd finds, for one token and for three."""
    for tokens in (1, 3):
        W, A, B, x, g = _random((5, 6), (2, 6), (5, 2), (tokens, 6), (tokens, 5))
        A, B = A.requires_grad_(), B.requires_grad_()
        h = x @ W.T + 1.5 * (x @ A.T) @ B.T
        expected = torch.autograd.grad(h, (A, B), g)
        found = answer(x, g, A.detach(), B.detach(), 1.5)
        if not all(_close(mine, its, 1e-6) for mine, its in zip(found, expected, strict=True)):
            return False
    return True


def _stacked(answer: Callable[..., tuple[Tensor, Tensor, float]]) -> bool:
    """The output of one adapter, at most of rank 8, is the sum of the outputs of two."""
    A1, B1, A2, B2, x = _random((4, 60), (40, 4), (4, 60), (40, 4), (60,))
    A, B, alpha = answer(A1, B1, A2, B2)
    both = 4 * (B1 @ (A1 @ x)) + 4 * (B2 @ (A2 @ x))
    return len(A) <= 8 and _close(alpha / len(A) * (B @ (A @ x)), both, 1e-6)


def _rate_of_twice_alpha(answer: float) -> bool:
    return _close(answer, 0.001, 1e-6)


# --- Chapter 4: what LoRA saves -------------------------------------------------------------------


def _trained_in_tinyllama(answer: int) -> bool:
    """A and B of q_proj and v_proj in 22 layers, and the head."""
    a_layer = (8 * 2048 + 2048 * 8) + (8 * 2048 + 256 * 8)
    return answer == 22 * a_layer + 5 * 2048


def _more_multiplications(answer: float) -> bool:
    """In per cent, of one layer: each linear layer multiplies once for each entry."""
    layer = 2048 * (2048 + 256 + 256 + 2048 + 3 * 5632)
    return abs(answer - 100 * 8 * (2048 + 2048 + 2048 + 256) / layer) < 0.005


def _adapter_test(answer: Callable[[nn.Module, Callable], None]) -> bool:
    """It passes a small adapter and fails a large one and a step that changes the base."""

    def step(model: nn.Module) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        model(torch.randn(4, 400)).sum().backward()
        optimizer.step()

    def step_that_changes_the_base(model: nn.Module) -> None:
        step(model)
        model.get_submodule("0").weight.data.add_(0.01)

    return (
        _passes(answer, _adapted(rank=1), step)
        and not _passes(answer, _adapted(rank=8), step)
        and not _passes(answer, _adapted(rank=1), step_that_changes_the_base)
    )


def _adapted(rank: int) -> nn.Module:
    """A layer of 400 × 400 with LoRA, which trains 0.5% of it for each unit of rank."""
    model = nn.Sequential(nn.Linear(400, 400, bias=False))
    config = clinora.LoRAConfig(rank=rank, targets=("0",), also_train=())
    clinora.apply_lora(model, config)
    return model


def _passes(test: Callable[[nn.Module, Callable], None], model: nn.Module, step: Callable) -> bool:
    try:
        test(model, step)
    except AssertionError:
        return False
    return True


def _share_of_activations(answer: float) -> bool:
    """Measured: 1.41 of 45.46 MB."""
    return 0.025 < answer < 0.04


# --- Chapter 5: how much to train -----------------------------------------------------------------


def _all_linears(answer: int) -> bool:
    """The parameters of rank 8 on every linear layer, and of the head, summed one by one."""
    total = 5 * 320  # the head
    for _ in range(6):  # layers
        for out, width in ((320, 320), (160, 320), (160, 320), (320, 320)):  # q, k, v, o
            total += 8 * width + out * 8
        for out, width in ((896, 320), (896, 320), (320, 896)):  # gate, up, down
            total += 8 * width + out * 8
    return answer == total


def _independent_difference(answer: float) -> bool:
    """In points: 1.96 standard errors of the difference of two shares of 367."""
    variance = 0.95 * 0.05 / 367
    return _close(answer, 100 * 1.96 * (variance + variance) ** 0.5, 0.03)


def _stabilised_alpha(answer: float) -> bool:
    """The α' for which α'/√8 is 16/8."""
    return _close(answer / 8**0.5, 2, 0.002)


def _passes_for_a_head(answer: int) -> bool:
    """Once for each note, as the decoder is frozen."""
    return answer == 1204


# --- Chapter 6: when to believe an answer ---------------------------------------------------------


def _ceiling(answer: float) -> bool:
    """A text with k rows is right on one of them."""
    rows = [1] * 60 + [2] * 30 + [3] * 10
    return _close(answer, len(rows) / sum(rows), 1e-3)


def _least_cross_entropy(answer: float) -> bool:
    """The entropy of the target: ln 2."""
    return _close(answer, 0.693147, 2e-3)


def _wrong_of_30(answer: int) -> bool:
    """The most for which Wilson's lower limit is at least 0.85.

    The lower limit of k of n is the smaller root p of (p − k/n)² = 1.96²·p·(1 − p)/n. It is at
    least 0.85 if the left side is not smaller at 0.85, with k/n above.
    """
    allowed = 1.96**2 * 0.85 * 0.15 / 30
    fits = [wrong for wrong in range(5) if (1 - wrong / 30 - 0.85) ** 2 >= allowed]
    return answer == max(fits)


def _misleading_confidence(answer: tuple[Sequence[float], Sequence[int]]) -> bool:
    """The eight most confident of ten are less often correct than all ten."""
    confidence, correct = ([float(value) for value in values] for values in answer)
    if len(confidence) != 10 or len(set(confidence)) != 10 or not set(correct) <= {0, 1}:
        return False
    ordered = [is_right for _, is_right in sorted(zip(confidence, correct, strict=True))]
    return sum(ordered[2:]) / 8 < sum(ordered) / 10


# --- Chapter 7: which LoRA ------------------------------------------------------------------------


def _trained_by_dora(answer: Callable[[int, int, int], int]) -> bool:
    """A, B and one magnitude for each output."""
    for out, width, rank in ((320, 320, 8), (160, 320, 8), (30, 7, 2)):
        parts = torch.empty(rank, width), torch.empty(out, rank), torch.empty(out)
        if answer(out, width, rank) != sum(part.numel() for part in parts):
            return False
    return True


def _merged_dora(answer: Callable[..., Tensor]) -> bool:
    """Row by row: the merged weight is m times the unit vector of W + s·B·A, and W is unchanged."""
    W, A, B, m = _random((5, 6), (2, 6), (5, 2), (5,))
    before = W.clone()
    merged = answer(W, A, B, 1.5, m)
    rows = [before[i] + 1.5 * sum(B[i, j] * A[j] for j in range(2)) for i in range(5)]
    expected = torch.stack([m[i] * row / row.dot(row) ** 0.5 for i, row in enumerate(rows)])
    return torch.equal(W, before) and _close(merged, expected, 1e-6)


def _pissa_start(answer: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]) -> bool:
    """s·B·A is W's part along the eigenvectors of W·Wᵀ with the r largest eigenvalues."""
    (W,) = _random((5, 6))
    for rank, s in ((1, 1), (2, 2), (3, 0.5)):
        A, B = answer(W, rank, s)
        largest = torch.linalg.eigh(W @ W.T).eigenvectors[:, -rank:]  # in ascending order
        if A.shape != (rank, 6) or B.shape != (5, rank):
            return False
        if not _close(s * B @ A, largest @ largest.T @ W, 1e-6):
            return False
    return True


def _range_of_ratio(answer: Sequence[float]) -> bool:
    """Each optimum is at most a factor √3 away from its point, so their ratio a factor 3."""
    low, high = answer
    return _close(low, 3, 0.01) and _close(high, 27, 0.01)


# --- Helpers --------------------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = _generator(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _close(found: object, expected: object, tolerance: float) -> bool:
    """Whether two numbers or tensors of one shape agree, relative to the largest expected entry."""
    found = torch.as_tensor(found, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


CHECKS: dict[str, Callable[..., bool]] = {
    "1.1": _layer_parameters,
    "1.2": _slowest_turn,
    "1.3": _uniform_attention,
    "1.4": _padded_batch,
    "2.1": _largest_rank,
    "2.2": _error_of_best_approximation,
    "2.3": _share_in_noise,
    "3.1": _merged_weight,
    "3.2": _gradients,
    "3.3": _stacked,
    "3.4": _rate_of_twice_alpha,
    "4.1": _trained_in_tinyllama,
    "4.2": _more_multiplications,
    "4.3": _adapter_test,
    "4.4": _share_of_activations,
    "5.1": _all_linears,
    "5.2": _independent_difference,
    "5.3": _stabilised_alpha,
    "5.4": _passes_for_a_head,
    "6.1": _ceiling,
    "6.2": _least_cross_entropy,
    "6.3": _wrong_of_30,
    "6.4": _misleading_confidence,
    "7.1": _trained_by_dora,
    "7.2": _merged_dora,
    "7.3": _pissa_start,
    "7.4": _range_of_ratio,
}
