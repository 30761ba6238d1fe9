"""Each kernel against the textbook form in its docstring, and under PyTorch's transforms."""

import inspect
import itertools
import math
import textwrap
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from clinora import kernels
from clinora.kernels import (
    causal_attention,
    dropout,
    gated_silu,
    last_token_attention,
    rms_normalize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def textbook(kernel):
    """Compile the textbook form that stands in a kernel's docstring."""
    lines = inspect.getdoc(kernel).splitlines()
    after = lines[lines.index("Textbook form::") + 1 :]
    block = itertools.takewhile(lambda line: not line or line.startswith(" "), after)
    scope = {"torch": torch}
    exec(textwrap.dedent("\n".join(block)), scope)
    return scope[kernel.__name__]


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# Every kernel with inputs that require a gradient. In bfloat16 the backward pass of attention is in
# tiles.

EPS = 1e-3
LENGTHS = torch.tensor([11, 1, 6])
KERNELS = {
    "rms_normalize": (partial(rms_normalize, eps=EPS), partial(textbook(rms_normalize), eps=EPS)),
    "causal_attention": (causal_attention, textbook(causal_attention)),
    "last_token_attention": (
        partial(last_token_attention, lengths=LENGTHS),
        partial(textbook(last_token_attention), lengths=LENGTHS),
    ),
    "gated_silu": (gated_silu, textbook(gated_silu)),
}
SHAPES = {
    "rms_normalize": [(3, 5, 16)],
    "causal_attention": [(3, 4, 70, 8), (3, 2, 70, 8), (3, 2, 70, 8)],
    "last_token_attention": [(3, 4, 1, 8), (3, 2, 11, 8), (3, 2, 11, 8)],
    "gated_silu": [(3, 5, 16), (3, 5, 16)],
}
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 0.02}

each_kernel = pytest.mark.parametrize("name", KERNELS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def inputs_of(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(shape).to(dtype) for shape in SHAPES[name])


def doubled(tensors):
    return tuple(x.double() for x in tensors)


def weighted_sum(function):
    """A scalar of a function's output whose gradient is neither constant nor zero."""

    def scalar(*inputs):
        y = function(*inputs)
        y = y.double() if y.dtype == torch.float64 else y.float()
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()

    return scalar


def gradients(function, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(weighted_sum(function)(*inputs), inputs)


def second_gradients(function, inputs):
    """Differentiate the squared length of the gradient."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    first = torch.autograd.grad(weighted_sum(function)(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


def second_gradients_by_torch_func(function, inputs):
    every = tuple(range(len(inputs)))

    def squared_length(*inputs):
        first = torch.func.grad(weighted_sum(function), argnums=every)(*inputs)
        return sum(g.square().sum() for g in first)

    return torch.func.grad(squared_length, argnums=every)(*inputs)


@each_dtype
@each_kernel
def test_output_is_that_of_the_textbook(name, dtype, difference):
    kernel, plain = KERNELS[name]
    inputs = inputs_of(name, dtype)
    out = kernel(*inputs)
    assert out.dtype == dtype
    assert difference(out, plain(*doubled(inputs))) <= TOLERANCE[dtype]


@each_dtype
@each_kernel
def test_gradients_are_those_of_the_textbook(name, dtype, difference):
    kernel, plain = KERNELS[name]
    inputs = inputs_of(name, dtype)
    exact = gradients(plain, doubled(inputs))
    for ours, reference in zip(gradients(kernel, inputs), exact, strict=True):
        assert ours.dtype == dtype
        assert difference(ours, reference) <= TOLERANCE[dtype]


@each_dtype
@each_kernel
def test_torch_func_grad_is_the_gradient_of_the_textbook(name, dtype, difference):
    kernel, plain = KERNELS[name]
    inputs = inputs_of(name, dtype)
    ours = torch.func.grad(weighted_sum(kernel), argnums=tuple(range(len(inputs))))(*inputs)
    for found, reference in zip(ours, gradients(plain, doubled(inputs)), strict=True):
        assert difference(found, reference) <= TOLERANCE[dtype]


@each_dtype
@each_kernel
def test_vmap_over_one_input_or_all_gives_what_a_loop_gives(name, dtype, difference):
    kernel, plain = KERNELS[name]
    samples = [inputs_of(name, dtype) for _ in range(3)]
    batches = [torch.stack(xs) for xs in zip(*samples, strict=True)]
    combinations = [(0,) * len(batches)]
    for i in range(len(batches)):
        combinations.append(tuple(0 if i == j else None for j in range(len(batches))))
    for dims in combinations:
        inputs = [x if dim == 0 else x[0] for x, dim in zip(batches, dims, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PyTorch warns where it falls back on a slow loop
            ours = torch.vmap(kernel, dims)(*inputs)
        for i in range(3):
            row = [x[i] if dim == 0 else x for x, dim in zip(inputs, dims, strict=True)]
            assert difference(ours[i], plain(*doubled(row))) <= TOLERANCE[dtype]


@each_dtype
@each_kernel
def test_gradients_of_each_sample_are_those_of_a_loop(name, dtype, difference):
    kernel, plain = KERNELS[name]
    samples = [inputs_of(name, dtype) for _ in range(3)]
    batches = [torch.stack(xs) for xs in zip(*samples, strict=True)]
    every = tuple(range(len(batches)))
    ours = torch.vmap(torch.func.grad(weighted_sum(kernel), argnums=every))(*batches)
    for i, sample in enumerate(samples):
        exact = gradients(plain, doubled(sample))
        for found, reference in zip(ours, exact, strict=True):
            assert difference(found[i], reference) <= TOLERANCE[dtype]


@each_dtype
@each_kernel
def test_forward_mode_is_that_of_the_textbook(name, dtype, difference):
    kernel, plain = KERNELS[name]
    inputs, tangents = inputs_of(name, dtype), inputs_of(name, dtype)
    _, ours = torch.func.jvp(kernel, inputs, tangents)
    _, exact = torch.func.jvp(plain, doubled(inputs), doubled(tangents))
    assert difference(ours, exact) <= TOLERANCE[dtype]


@each_dtype
@each_kernel
def test_second_derivatives_by_torch_func_are_those_of_the_textbook(name, dtype, difference):
    """A backward pass that saved 1/rms(x) as a constant gave zeros here, and no error."""
    kernel, plain = KERNELS[name]
    inputs = inputs_of(name, dtype)
    ours = second_gradients_by_torch_func(kernel, inputs)
    exact = second_gradients(plain, doubled(inputs))
    for found, reference in zip(ours, exact, strict=True):
        assert difference(found, reference) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("rms_normalize", torch.bfloat16),
        ("causal_attention", torch.bfloat16),
        ("gated_silu", torch.bfloat16),
        ("gated_silu", torch.float32),
    ],
)
def test_second_derivatives_by_autograd_are_those_of_the_textbook(name, dtype, difference):
    kernel, plain = KERNELS[name]
    inputs = inputs_of(name, dtype)
    ours = second_gradients(kernel, inputs)
    exact = second_gradients(plain, doubled(inputs))
    for found, reference in zip(ours, exact, strict=True):
        assert difference(found, reference) <= 2 * TOLERANCE[dtype]


def test_one_tensor_may_be_two_inputs_of_a_second_derivative(difference):
    inputs = inputs_of("gated_silu", torch.float32)[:1]
    ours = second_gradients(lambda x: gated_silu(x, x), inputs)
    exact = second_gradients(lambda x: textbook(gated_silu)(x, x), doubled(inputs))
    assert difference(ours[0], exact[0]) <= TOLERANCE[torch.float32]


def test_a_second_derivative_needs_no_gradient_of_every_input(difference):
    gate, up = inputs_of("gated_silu", torch.float32)
    ours = second_gradients(lambda x: gated_silu(x, up), (gate,))
    exact = second_gradients(lambda x: textbook(gated_silu)(x, up.double()), doubled((gate,)))
    assert difference(ours[0], exact[0]) <= TOLERANCE[torch.float32]


@each_dtype
@each_kernel
def test_kernel_compiles_as_one_graph_with_its_backward_pass(name, dtype, difference):
    kernel, plain = KERNELS[name]
    inputs = inputs_of(name, dtype)
    torch.compiler.reset()
    compiled = torch.compile(lambda *xs: kernel(*xs), fullgraph=True, backend="aot_eager")
    exact = gradients(plain, doubled(inputs))
    for ours, reference in zip(gradients(compiled, inputs), exact, strict=True):
        assert difference(ours, reference) <= TOLERANCE[dtype]


# RMSNorm


def test_a_half_precision_norm_saves_no_float32_copy_of_its_input():
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    saved = saved_tensors(lambda: rms_normalize(x, EPS))
    assert sorted(t.nbytes for t in saved) == [64 * 4, 64 * 32 * 2]  # 1/rms(x) and x itself


def test_a_large_float16_number_has_a_finite_square():
    x = torch.full((4,), 1000.0, dtype=torch.float16)
    assert rms_normalize(x, 0.0).tolist() == [1.0] * 4


def saved_tensors(compute) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        compute()
    return saved


# Attention


@pytest.mark.parametrize("heads, key_heads", [(8, 2), (4, 4), (6, 1)])
def test_query_heads_share_key_heads_in_order(heads, key_heads, difference):
    q = torch.randn(2, heads, 11, 6)
    k, v = torch.randn(2, 2, key_heads, 11, 6)
    exact = textbook(causal_attention)(*doubled((q, k, v)))
    assert difference(causal_attention(q, k, v), exact) <= 1e-6


@pytest.mark.parametrize("heads, key_heads", [(8, 2), (4, 4)])
def test_the_last_token_gets_what_it_gets_among_all(heads, key_heads, difference):
    """With is_causal, a single query would see position 0 alone."""
    q = torch.randn(3, heads, 11, 6)
    k, v = torch.randn(2, 3, key_heads, 11, 6)
    rows = torch.arange(3)
    exact = textbook(causal_attention)(*doubled((q, k, v)))[rows, :, LENGTHS - 1]
    one = last_token_attention(q[rows, :, LENGTHS - 1][:, :, None], k, v, LENGTHS)
    assert difference(one.squeeze(2), exact) <= 1e-6


def tiled_inputs(tokens: int, heads: int, key_heads: int, width: int, spread: float = 1.0):
    """q, k, v and the output's gradient in bfloat16, laid out in memory as the decoder's are."""
    generator = torch.Generator().manual_seed(0)
    numbers = (heads, key_heads, key_heads, heads)
    q, k, v, grad = (
        torch.randn(3, tokens, n, width, generator=generator).bfloat16().transpose(1, 2)
        for n in numbers
    )
    return [(spread * q).requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def output_and_gradients(function, q, k, v, grad) -> list[torch.Tensor]:
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


TILED = {
    "one tile": (128, 4, 2, 64),
    "a row more than a tile": (129, 8, 2, 32),
    "ragged tiles": (300, 6, 1, 64),
    "ungrouped": (150, 3, 3, 128),
}
tiled = pytest.mark.parametrize("shape", TILED.values(), ids=TILED)


@tiled
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_tiled_attention_is_as_exact_as_pytorchs(shape, spread):
    """Output and all three gradients, at flat and at peaked probabilities."""
    inputs = tiled_inputs(*shape, spread)
    doubles = (x.detach().double().requires_grad_() for x in inputs[:3])
    exact = output_and_gradients(textbook(causal_attention), *doubles, inputs[3])
    fused = output_and_gradients(
        lambda q, k, v: nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
        *inputs,
    )
    ours = output_and_gradients(causal_attention, *inputs)
    for name, x, reference, y in zip(("out", "q", "k", "v"), ours, fused, exact, strict=True):
        assert x.dtype == torch.bfloat16 and x.shape == y.shape
        assert 0 < rms(x - y) <= 1.2 * rms(reference - y) < 0.02 * rms(y), name


@tiled
def test_tiled_attention_saves_its_inputs_its_output_and_a_number_a_row(shape):
    q, k, v, _ = tiled_inputs(*shape)
    outputs = []
    saved = saved_tensors(lambda: outputs.append(causal_attention(q, k, v)))
    whole = {x.data_ptr() for x in (q, k, v, outputs[0])}
    (log_sums,) = [x for x in saved if x.data_ptr() not in whole]
    assert len(saved) == 5
    assert (log_sums.dtype, log_sums.numel()) == (torch.float32, q[..., 0].numel())


def test_very_low_scores_cost_no_accuracy():
    """Most keys of a row then have no weight in float32; those that have keep their gradients."""
    inputs = tiled_inputs(150, 4, 2, 64, spread=30.0)
    doubles = (x.detach().double().requires_grad_() for x in inputs[:3])
    exact = output_and_gradients(textbook(causal_attention), *doubles, inputs[3])
    ours = output_and_gradients(causal_attention, *inputs)
    for x, y in zip(ours, exact, strict=True):
        assert x.isfinite().all() and rms(x - y) <= 0.02 * rms(y)


def test_tiled_attention_is_the_same_under_autocast():
    """Autocast would multiply float32 scores and probabilities in bfloat16."""
    inputs = tiled_inputs(100, 4, 2, 64)
    plain = output_and_gradients(causal_attention, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = output_and_gradients(causal_attention, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("tokens", [100, 800, 1400])
def test_tiled_attention_treats_each_note_alone(tokens):
    """A tile spans all 3 notes, 2 of them, or one: the fewer, the more tokens there are."""
    inputs = tiled_inputs(tokens, 4, 2, 32)
    together = output_and_gradients(causal_attention, *inputs)
    notes = []
    for i in range(3):
        note = [x[i : i + 1].detach().requires_grad_() for x in inputs[:3]]
        notes.append(output_and_gradients(causal_attention, *note, inputs[3][i : i + 1]))
    for x, *alone in zip(together, *notes, strict=True):
        assert rms(x - torch.cat(alone)) <= 1e-3 * rms(x)


LAYOUTS = {
    "the last two dimensions swapped in memory": lambda x: x.mT.contiguous().mT,
    "every second entry": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_tiled_attention_reads_any_layout_of_its_inputs(layout, which):
    inputs = tiled_inputs(150, 4, 2, 32)
    inputs[which] = layout(inputs[which].detach()).requires_grad_()
    doubles = [x.detach().double().requires_grad_() for x in inputs[:3]]
    exact = output_and_gradients(textbook(causal_attention), *doubles, inputs[3])
    ours = output_and_gradients(causal_attention, *inputs)
    for x, y in zip(ours, exact, strict=True):
        assert rms(x - y) <= 0.01 * rms(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_stay_with_pytorch_to_the_bit(dtype):
    q, k, v, _ = (x.detach().to(dtype) for x in tiled_inputs(100, 4, 2, 64))
    fused = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(causal_attention(q, k, v), fused)


@pytest.mark.parametrize("t", [10, 64, 127, 128, 130])
def test_a_later_token_changes_nothing_before_it(t):
    q, k, v, _ = (x.detach() for x in tiled_inputs(150, 4, 2, 32))
    before = causal_attention(q, k, v)
    k[:, :, t] += 1.0
    v[:, :, t] += 1.0
    same = (causal_attention(q, k, v) == before).all(-1)
    assert same[:, :, :t].all() and not same[:, :, t:].any()


@pytest.mark.parametrize("t", [10, 64, 127, 128, 130])
def test_no_gradient_comes_to_a_token_from_those_before_it(t):
    q, k, v, grad = tiled_inputs(150, 4, 2, 32)
    grad[:, :, t:] = 0
    gradients = torch.autograd.grad(causal_attention(q, k, v), (q, k, v), grad)
    for gradient in gradients:
        assert (gradient[:, :, t:] == 0).all() and (gradient[:, :, t - 1] != 0).any()


def test_probabilities_of_very_low_scores_are_no_denormal_numbers(monkeypatch):
    """A CPU computes with those up to 90 times more slowly."""
    tiles = []

    def keep(p, rows):
        zero_later_keys(p, rows)
        tiles.append(p.clone())

    zero_later_keys = kernels._zero_later_keys
    monkeypatch.setattr(kernels, "_zero_later_keys", keep)
    output_and_gradients(causal_attention, *tiled_inputs(150, 4, 2, 64, spread=30.0))
    for p in tiles:
        assert ((p == 0) | (p >= torch.finfo(torch.float32).tiny)).all()


def test_the_gradient_of_the_norm_of_large_numbers_is_not_lost(difference):
    x = (1e16 * torch.randn(5, 64)).bfloat16()
    exact = gradients(KERNELS["rms_normalize"][1], doubled((x,)))
    (ours,) = gradients(KERNELS["rms_normalize"][0], (x,))
    assert difference(1e16 * ours.double(), 1e16 * exact[0]) <= TOLERANCE[torch.bfloat16]


# The gate of the MLP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_silu_is_what_autograd_makes_of_it_to_the_bit(dtype):
    gate, up = torch.randn(2, 40, 30).to(dtype).requires_grad_().unbind()
    grad = torch.randn(40, 30).to(dtype)
    plain = nn.functional.silu(gate) * up
    ours = gated_silu(gate, up)
    assert torch.equal(ours, plain)
    pairs = (torch.autograd.grad(y, (gate, up), grad) for y in (ours, plain))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_a_gate_saves_its_two_inputs_alone():
    gate, up = torch.randn(2, 40, 30).requires_grad_().unbind()
    saved = saved_tensors(lambda: gated_silu(gate, up))
    assert {x.data_ptr() for x in saved} == {gate.data_ptr(), up.data_ptr()}
    assert len(saved) == 2


# Dropout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_dropout_has_the_mean_and_spread_of_the_textbook():
    x, p = torch.ones(400_000), 77 / 256
    ours, plain = dropout(x, p, True), textbook(dropout)(x, p, True)
    assert ours.mean().item() == pytest.approx(plain.mean().item(), abs=0.01)
    assert ours.std().item() == pytest.approx(plain.std().item(), rel=0.01)
    assert torch.equal(dropout(x, p, False), textbook(dropout)(x, p, False))


def test_samples_under_vmap_have_masks_of_their_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = torch.vmap(partial(dropout, p=0.5, training=True), randomness="different")(
            torch.ones(2, 4096)
        )
    assert ((y == 0).double().mean(1) - 0.5).abs().max() < 0.05
    assert 0.4 < ((y[0] == 0) == (y[1] == 0)).double().mean() < 0.6


def test_torch_func_grad_of_dropout_is_its_mask_and_scale():
    def scalar(x):
        y = dropout(x, 0.5, True)
        return y.sum(), y

    grad, y = torch.func.grad(scalar, has_aux=True)(torch.ones(4096))
    assert torch.equal(grad, y) and set(grad.tolist()) == {0.0, 2.0}


def test_dropout_compiles_as_one_graph_with_its_backward_pass():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: dropout(x, 0.5, True), fullgraph=True, backend="aot_eager")
    x = torch.ones(4096, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and set(y.tolist()) == {0.0, 2.0}


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    x = dropout(torch.ones(200_000), 0.3, True)
    assert sorted(set(x.tolist())) == pytest.approx([0.0, 256 / (256 - 77)])  # 77/256 is nearest
    assert (x == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert torch.equal(dropout(torch.ones(9), 0.3, False), torch.ones(9))


@pytest.mark.parametrize("p, dropped", [(0.05, 13), (0.3, 77), (0.5, 128), (0.999, 255)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_divides_by_the_exact_share_of_bytes_kept(p, dropped, dtype):
    """Dividing by 1 − p would make the mean of p = 0.05 wrong by 0.08%."""
    x = dropout(torch.ones(40_000, dtype=dtype), p, True)
    scale = torch.tensor(256 / (256 - dropped), dtype=dtype)
    assert set(x.tolist()) == {0.0, scale.item()}


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_every_byte_of_a_number_alike(p):
    """torch.randint's top bit is always 0: as bytes, every eighth would drop twice as often."""
    n = 2**18
    dropped = (dropout(torch.ones(n, 8), p, True) == 0).double().mean(0)
    share = round(256 * p) / 256
    assert (dropped - share).abs().max().item() < 5 * math.sqrt(share * (1 - share) / n)


def test_dropout_of_neighbours_is_independent():
    n = 2**18
    dropped = (dropout(torch.ones(n, 8), 0.5, True) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(8)
    assert correlation.abs().max().item() < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_dropout_is_its_mask_and_scale(dtype):
    x = torch.randn(64, 33, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.5, True)
    grad = torch.randn_like(x)
    y.backward(grad)
    assert torch.equal(x.grad, torch.where(y == 0, 0, 2 * grad))
    assert 0 < (y == 0).sum() < y.numel()


def test_dropout_repeats_with_the_seed():
    x, masks = torch.ones(10_001), []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        masks.append(dropout(x, 0.5, True))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_dropout_saves_a_byte_an_entry():
    x = torch.randn(4096, requires_grad=True)
    saved = saved_tensors(lambda: dropout(x, 0.5, True))
    assert sum(x.untyped_storage().nbytes() for x in saved) <= 4096 + 8


def test_a_probability_below_a_byte_is_left_to_pytorch():
    assert 0 < (dropout(torch.ones(1_000_000), 1e-3, True) == 0).sum().item() < 2000
