"""The checks of the course's exercises: wrong answers fail, right ones pass, in either form.

Each exercise is tried blank, with three wrong answers that students give, with a right one, and
with another right one.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from clinora.testing import assert_trains_at_most, base_unchanged

PATH = Path(__file__).parents[1] / "notebooks" / "exercises.py"
SPEC = importlib.util.spec_from_file_location("exercises", PATH)
exercises = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(exercises)


def layer_parameters(D, H, K, E, I):  # noqa: E741
    return 2 * D * H * E + 2 * D * K * E + 3 * D * I + 2 * D


def layer_parameters_weight_by_weight(D, H, K, E, I):  # noqa: E741
    weights = [torch.empty(*shape, device="meta") for shape in ((H, E, D), (2, K, E, D), (D, H, E))]
    weights += [torch.empty(3, I, D, device="meta"), torch.empty(2, D, device="meta")]
    return sum(weight.numel() for weight in weights)


def pad_by_pytorch(notes):
    rows = [torch.tensor(note) for note in notes]
    return pad_sequence(rows, batch_first=True), [len(note) for note in notes]


def pad_by_hand(notes):
    longest = max(map(len, notes))
    ids = torch.tensor([note + [0] * (longest - len(note)) for note in notes])
    return ids, torch.tensor([len(note) for note in notes])


def pad_on_the_left(notes):
    longest = max(map(len, notes))
    ids = torch.tensor([[0] * (longest - len(note)) + note for note in notes])
    return ids, torch.tensor([len(note) for note in notes])


def pad_with_equal_lengths(notes):
    ids, _ = pad_by_hand(notes)
    return ids, torch.full((len(notes),), ids.shape[1])


def cut_to_the_shortest(notes):
    shortest = min(map(len, notes))
    return torch.tensor([note[:shortest] for note in notes]), torch.full((len(notes),), shortest)


def checks_share_alone(model, step):
    assert_trains_at_most(model, percent=1)


def checks_base_alone(model, step):
    with base_unchanged(model):
        step(model)


def checks_both(model, step):
    checks_share_alone(model, step)
    checks_base_alone(model, step)


def checks_both_by_hand(model, step):
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert sum(p.numel() for p in trained) <= 0.01 * sum(p.numel() for p in parameters)
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    before = [parameter.clone() for parameter in frozen]
    step(model)
    assert all(torch.equal(old, new) for old, new in zip(before, frozen, strict=True))


def by_search(rows, columns):
    rank = 1
    while (rank + 1) * (rows + columns) < rows * columns:
        rank += 1
    return rank


def gradients(x, g, A, B, s):
    return s * (g @ B).T @ x, s * g.T @ (x @ A.T)


def gradients_token_by_token(x, g, A, B, s):
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    for token, gradient in zip(x, g, strict=True):
        dA += s * torch.outer(B.T @ gradient, token)
        dB += s * torch.outer(gradient, A @ token)
    return dA, dB


def gradients_of_the_mean(x, g, A, B, s):
    dA, dB = gradients(x, g, A, B, s)
    return dA / len(x), dB / len(x)


def merge_in_place(W, A, B, alpha):
    W += alpha / len(A) * (B @ A)
    return W


def stack(A1, B1, A2, B2):
    return torch.cat((A1, A2)), torch.cat((B1, B2), dim=1), 32


def stack_by_svd(A1, B1, A2, B2):
    U, sigma, Vh = torch.linalg.svd(4 * (B1 @ A1 + B2 @ A2))
    return Vh[:8], U[:, :8] * sigma[:8], 8


def stack_with_the_same_alpha(A1, B1, A2, B2):
    return torch.cat((A1, A2)), torch.cat((B1, B2), dim=1), 16


def stack_of_twice_the_rank(A1, B1, A2, B2):
    none_A, none_B = torch.zeros_like(A1), torch.zeros_like(B1)
    A = torch.cat((A1, A2, none_A, none_A))
    return A, torch.cat((B1, B2, none_B, none_B), dim=1), 64


def merge_dora(W, A, B, s, m):
    V = W + s * B @ A
    return m[:, None] * V / V.norm(dim=1, keepdim=True)


def merge_dora_by_pytorch(W, A, B, s, m):
    return torch.diag(m) @ torch.nn.functional.normalize(torch.addmm(W, B, A, alpha=s), dim=1)


def merge_dora_by_columns(W, A, B, s, m):
    V = W + s * B @ A
    return m[:, None] * V / V.norm(dim=0)


def merge_dora_with_the_norms_of_the_base(W, A, B, s, m):
    return m[:, None] * (W + s * B @ A) / W.norm(dim=1, keepdim=True)


def pissa(W, rank, s):
    U, sigma, Vh = torch.linalg.svd(W)
    root = (sigma[:rank] / s).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def pissa_by_projection(W, rank, s):
    """Two other factors of the same product."""
    U = torch.linalg.svd(W)[0][:, :rank]
    return U.T @ W, U / s


def pissa_without_scaling(W, rank, s):
    A, B = pissa(W, rank, s)
    return A * s**0.5, B * s**0.5


def pissa_of_the_smallest(W, rank, s):
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (sigma[-rank:] / s).sqrt()
    return root[:, None] * Vh[-rank:], U[:, -rank:] * root


def pissa_without_roots(W, rank, s):
    U, sigma, Vh = torch.linalg.svd(W)
    return sigma[:rank, None] * Vh[:rank] / s, U[:, :rank] * sigma[:rank]


RIGHT = {
    "1.1": (layer_parameters, layer_parameters_weight_by_weight),
    "1.2": (2 * torch.pi * 10_000 ** (78 / 80), 49_909),
    "1.3": (
        lambda values: values.cumsum(0) / torch.arange(1, len(values) + 1)[:, None],
        lambda values: torch.nn.functional.scaled_dot_product_attention(
            torch.zeros_like(values), torch.zeros_like(values), values, is_causal=True
        ),
    ),
    "1.4": (pad_by_pytorch, pad_by_hand),
    "2.1": (lambda rows, columns: (rows * columns - 1) // (rows + columns), by_search),
    "2.2": (
        lambda sigma, rank: sigma[rank:].square().sum().sqrt(),
        lambda sigma, rank: float(sigma.norm() ** 2 - sigma[:rank].norm() ** 2) ** 0.5,
    ),
    "2.3": (0.09, torch.tensor(0.093)),
    "3.1": (
        lambda W, A, B, alpha: W + alpha / A.shape[0] * (B @ A),
        lambda W, A, B, alpha: torch.addmm(W, B, A, alpha=alpha / B.shape[1]),
    ),
    "3.2": (gradients, gradients_token_by_token),
    "3.3": (stack, stack_by_svd),
    "3.4": (0.001, torch.tensor(1e-3)),
    "4.1": (1_136_640, 22 * 8 * 6400 + 10_240.0),
    "4.2": (0.12, 100 * 8 * 6400 / 44_040_192),
    "4.3": (checks_both, checks_both_by_hand),
    "4.4": (1.41 / 45.46, 0.03),
    "5.1": (284_224, 284_224.0),
    "5.2": (100 * 1.96 * (2 * 0.95 * 0.05 / 367) ** 0.5, 3.2),
    "5.3": (16 / 8**0.5, 5.657),
    "5.4": (1204, 1204.0),
    "6.1": (2 / 3, 0.667),
    "6.2": (0.693, float(torch.tensor(2.0).log())),
    "6.3": (0, 0.0),
    "6.4": (
        (range(10), [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]),
        (torch.linspace(1, 0.1, 10), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1, 1])),
    ),
    "7.1": (
        lambda out, width, rank: rank * (out + width) + out,
        lambda out, width, rank: sum([rank * width, rank * out, *[1] * out]),
    ),
    "7.2": (merge_dora, merge_dora_by_pytorch),
    "7.3": (pissa, pissa_by_projection),
    "7.4": ((3, 27), torch.tensor([9 / 3, 9.0 * 3])),
}

WRONG = {
    "1.1": (
        lambda D, H, K, E, I: 2 * D * D + 2 * D * K * E + 3 * D * I + 2 * D,  # noqa: E741
        lambda D, H, K, E, I: 4 * D * H * E + 3 * D * I + 2 * D,  # noqa: E741
        lambda D, H, K, E, I: layer_parameters(D, H, K, E, I) - 2 * D,  # noqa: E741
    ),
    "1.2": (2 * torch.pi * 10_000, 10_000, 1024),
    "1.3": (
        lambda values: values.mean(0).expand_as(values),
        torch.zeros_like,
        lambda values: values,
    ),
    "1.4": (pad_on_the_left, pad_with_equal_lengths, cut_to_the_shortest),
    "2.1": (
        lambda rows, columns: rows * columns // (rows + columns),  # as many entries, not fewer
        lambda rows, columns: rows // 2,
        lambda rows, columns: min(rows, columns),
    ),
    "2.2": (
        lambda sigma, rank: sigma[rank:].sum(),
        lambda sigma, rank: sigma[rank],  # the spectral norm
        lambda sigma, rank: sigma[rank + 1 :].square().sum().sqrt(),
    ),
    "2.3": (8 / 320, 0.57, 9),
    "3.1": (
        lambda W, A, B, alpha: W + alpha * (B @ A),
        lambda W, A, B, alpha: W + B @ A,
        merge_in_place,
    ),
    "3.2": (
        gradients_of_the_mean,
        lambda x, g, A, B, s: gradients(x[:1], g[:1], A, B, s),  # the first token alone
        lambda x, g, A, B, s: gradients(x, g, A, B, 1),
    ),
    "3.3": (
        stack_with_the_same_alpha,
        stack_of_twice_the_rank,
        lambda A1, B1, A2, B2: (A1 + A2, B1 + B2, 16),
    ),
    "3.4": (0.002, 0.004, 0.0005),
    "4.1": (1_126_400, 51_200, 22 * 8 * (2048 + 2048 + 2048 + 2048) + 10_240),
    "4.2": (0.058, 0.0145, 0.11),  # half, r forgotten, the share of the whole model
    "4.3": (checks_share_alone, checks_base_alone, lambda model, step: step(model)),
    "4.4": (1 / 6, 1, 0),
    "5.1": (282_624, 47_104, 55_360),  # without the head, one layer, on q_proj and v_proj alone
    "5.2": (100 * 1.96 * (0.95 * 0.05 / 367) ** 0.5, 1.6, 0.032),
    "5.3": (16, 2, 16 * 8**0.5),
    "5.4": (12_040, 10, 1),
    "6.1": (1, 0.6, 0.5),
    "6.2": (0, 0.5, 1),  # 1 is in bits
    "6.3": (1, 4, 2),
    "6.4": (
        (range(10), [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
        (range(10), [1] * 10),
        ([0.5] * 10, [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]),
    ),
    "7.1": (
        lambda out, width, rank: rank * (out + width),  # without magnitudes
        lambda out, width, rank: rank * (out + width) + width,  # one for each input
        lambda out, width, rank: rank * (out + width) + 1,
    ),
    "7.2": (
        merge_dora_by_columns,
        merge_dora_with_the_norms_of_the_base,
        lambda W, A, B, s, m: m[:, None] * (W + s * B @ A),
    ),
    "7.3": (pissa_without_scaling, pissa_of_the_smallest, pissa_without_roots),
    "7.4": ((9, 9), (9 / 3**0.5, 9 * 3**0.5), (1, 81)),
}


def test_every_exercise_is_tried():
    assert exercises.CHECKS.keys() == RIGHT.keys() == WRONG.keys()


@pytest.mark.parametrize("exercise", RIGHT)
def test_a_right_answer_in_two_forms_is_correct(exercise, capsys):
    for answer in RIGHT[exercise]:
        exercises.check(exercise, answer)
    assert capsys.readouterr().out == "Correct\nCorrect\n"


@pytest.mark.parametrize("exercise", WRONG)
def test_three_wrong_answers_and_a_blank_are_not_yet_correct(exercise, capsys):
    for answer in (..., lambda *_: ..., *WRONG[exercise]):
        exercises.check(exercise, answer)
    assert capsys.readouterr().out == "Not yet\n" * 5


def test_the_share_in_noise_that_is_accepted_is_that_of_random_matrices():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        sigma = torch.linalg.svdvals(torch.randn(320, 320, generator=generator))
        share = sigma[:8].square().sum() / sigma.square().sum()
        assert exercises.is_correct("2.3", share)
