"""NF4: codes as in QLoRA and bitsandbytes, linear layers and LoRA on them, loading and runs."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save, save_file
from torch import nn

import clinora
from clinora.checkpoint import CheckpointError, load_model
from clinora.lora import LoRAConfig, apply_lora, lora_layers, merge_lora, merged_weight
from clinora.quantize import NF4Tensor, quantize_nf4, quantized_bytes
from clinora.run import RunRecord
from clinora.training import TrainingConfig, train
from clinora.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")

# As bitsandbytes publishes it (functional.py, get_4bit_type, "nf4").
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
KINDS = ("nf4", "nf4-double")


def draw(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def unpacked(quantized):
    """The codes of a weight, one a number, without those that fill up the last block."""
    codes = torch.stack([quantized.codes >> 4, quantized.codes & 15], dim=-1)
    return codes.flatten()[: quantized.numel()].long()


def nearest(weight):
    """Code and scale of each number by their definition, in float64 but for w/s in float32."""
    codes, scales = [], []
    for block in weight.flatten().split(64):
        scale = block.abs().max().float()
        units = block.float() * (1 / scale) if scale else block.float() * 0
        distances = (units.double()[:, None] - torch.tensor(PUBLISHED, dtype=torch.float64)).abs()
        codes.append(distances.argmin(1))
        scales.append(scale)
    return torch.cat(codes), torch.stack(scales)


# --- Codes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 128), (7, 13), (1, 1), (3, 64)])
def test_a_code_is_the_nearest_value_and_a_scale_the_largest_of_64(shape, dtype):
    weight = draw(*shape, dtype=dtype)
    quantized = quantize_nf4(weight)
    codes, scales = nearest(weight)
    assert torch.equal(unpacked(quantized), codes)
    assert torch.equal(quantized.scales, scales)
    whole = torch.tensor(PUBLISHED)[codes] * scales.repeat_interleave(64)[: weight.numel()]
    assert torch.equal(quantized.dequantize(), whole.to(dtype).view(shape))


def test_between_two_values_the_nearer_one_is_taken_and_half_way_the_lower():
    table = torch.tensor(PUBLISHED)
    midpoints = (table[1:] + table[:-1]) / 2
    inf = torch.tensor(torch.inf)
    for step, upper in (
        (midpoints.nextafter(-inf), 0),
        (midpoints, 0),
        (midpoints.nextafter(inf), 1),
    ):
        block = torch.zeros(64)
        block[:15] = step
        block[15] = 1  # the scale
        assert unpacked(quantize_nf4(block))[:15].tolist() == [i + upper for i in range(15)]


def test_a_block_of_zeros_stays_zero():
    weight = draw(3, 64)
    weight[1] = 0
    quantized = quantize_nf4(weight)
    assert unpacked(quantized).view(3, 64)[1].eq(7).all()
    assert quantized.dequantize()[1].eq(0).all()
    assert quantized.dequantize().isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_refused(bad):
    weight = draw(4, 64)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize_nf4(weight)


def dynamic_map():
    """The 8-bit values as Dettmers et al. 2022 describe them: a zero, a one and seven decades."""
    values = [0.0, 1.0]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1)
        for centre in ((edges[:-1] + edges[1:]) / 2).tolist():
            values += [centre * 10.0 ** (bits - 6), -centre * 10.0 ** (bits - 6)]
    return torch.tensor(sorted(values), dtype=torch.float64)


def test_double_quantisation_keeps_the_codes_and_takes_the_nearest_scale_of_8_bits():
    weight = draw(300, 128) * torch.rand(300, 1, generator=torch.Generator().manual_seed(1))
    plain = quantize_nf4(weight)
    double = quantize_nf4(weight, double=True)
    assert torch.equal(double.codes, plain.codes)
    table = dynamic_map()
    assert len(table) == 256
    rest = (plain.scales - plain.scales.mean()).double()  # 600 scales, in blocks of 256
    scales = []
    for block in rest.split(256):
        largest = block.abs().max()
        nearest_values = table[(block[:, None] / largest - table).abs().argmin(1)]
        scales.append(nearest_values * largest + plain.scales.mean().double())
    whole = torch.tensor(PUBLISHED)[unpacked(double)].view(-1, 64) * torch.cat(scales)[:, None]
    torch.testing.assert_close(double.dequantize(), whole.float().view(300, 128), rtol=1e-5, atol=0)


def test_codes_and_scales_equal_those_that_bitsandbytes_made():
    """The file says which version and call made it."""
    made = json.loads((Path(__file__).parent / "nf4_bitsandbytes.json").read_text())
    ours = quantize_nf4(torch.tensor(made["weight"]))
    assert ours.codes.flatten().tolist() == made["codes"]
    assert ours.scales.tolist() == made["absmax"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 1152), (7, 64), (64, 13)])
def test_codes_scales_and_weights_equal_those_of_bitsandbytes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = draw(*shape, dtype=dtype)
    weight.view(-1)[64:128] = 0
    ours = quantize_nf4(weight)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(ours.codes.flatten()[: len(codes)], codes.flatten())
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(codes, state))
    double = quantize_nf4(weight, double=True)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(double.scale_table, state.state2.code)
    assert torch.equal(double.scales_of_scales, state.state2.absmax)
    assert torch.equal(double.mean_scale, state.offset)
    # The CPU kernel of bitsandbytes takes the second nearest value for about 1 scale in 500.
    differing = double.scales != state.absmax
    assert differing.float().mean() < 0.01
    assert (double.scales.int() - state.absmax.int()).abs().max() <= 1


@pytest.mark.parametrize(("kind", "most"), [("nf4", 4.5), ("nf4-double", 4.13)])
def test_bits_a_weight(kind, most):
    quantized = quantize_nf4(draw(512, 768), double=kind == "nf4-double")
    parts = [v for k, v in vars(quantized).items() if k != "scale_table" and v is not None]
    held = sum(part.untyped_storage().nbytes() for part in parts)
    assert held == quantized_bytes(512 * 768, kind)
    assert 8 * held / quantized.numel() <= most


# --- The linear layer ---


def layer_pair(dtype=torch.float32, bias=True, double=False):
    """A linear layer with an NF4 weight, and one with the numbers that it stands for."""
    ours = nn.Linear(128, 80, bias=bias, dtype=dtype)
    ours.weight = nn.Parameter(quantize_nf4(ours.weight, double=double), requires_grad=False)
    plain = nn.Linear(128, 80, bias=bias, dtype=dtype)
    plain.weight = nn.Parameter(ours.weight.dequantize(), requires_grad=False)
    if bias:
        plain.bias = nn.Parameter(ours.bias.detach().clone())
    return ours, plain


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128,), (6, 128), (2, 3, 128)])
def test_outputs_and_gradients_are_those_of_a_plain_layer_to_the_bit(shape, dtype, autocast):
    results = []
    for layer in layer_pair(dtype):
        x = draw(*shape, dtype=torch.float32 if autocast else dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(draw(*y.shape, dtype=y.dtype, seed=1))
        results.append((y, x.grad, layer.bias.grad))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


def test_nothing_but_the_codes_is_kept_for_the_backward_pass():
    layer, _ = layer_pair()
    x = draw(6, 128).requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert [type(tensor) for tensor in kept] == [NF4Tensor]
    assert kept[0].codes.data_ptr() == layer.weight.codes.data_ptr()
    y.sum().backward()
    assert x.grad is not None


def test_gradients_can_be_differentiated_again():
    layer, _ = layer_pair(torch.float64)
    x = draw(2, 128, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[:, :3].pow(2), x)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_of_torch_func_work_as_on_a_plain_layer(transform):
    calls = {
        "vmap": lambda layer, x: torch.func.vmap(layer)(x),
        "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).pow(2).sum())(x),
        "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1],
    }
    ours, plain = layer_pair()
    x = draw(5, 128)
    assert torch.equal(calls[transform](ours, x), calls[transform](plain, x))


@pytest.mark.slow
def test_a_compiled_layer_computes_the_same():
    ours, plain = layer_pair()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    results = []
    for layer in (compiled, plain):
        x = draw(6, 128).requires_grad_()
        y = layer(x)
        y.sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("double", [False, True])
def test_copies_moves_and_casts_keep_the_codes(double):
    layer, _ = layer_pair(double=double)
    exact = layer.weight.dequantize()
    for change in (copy.deepcopy, nn.Module.cpu, nn.Module.float):
        changed = change(copy.deepcopy(layer)).weight
        assert isinstance(changed, NF4Tensor)
        assert isinstance(changed, nn.Parameter)
        assert not changed.requires_grad
        assert torch.equal(changed.dequantize(), exact)
    half = copy.deepcopy(layer).bfloat16().weight
    assert isinstance(half, NF4Tensor)
    assert torch.equal(half.dequantize(), exact.bfloat16())
    assert copy.deepcopy(layer).to("meta").weight.codes.is_meta


def test_another_operation_reads_the_plain_weight():
    layer, plain = layer_pair()
    assert type(layer.weight + 1) is torch.Tensor
    assert torch.equal(layer.weight + 1, plain.weight + 1)
    assert torch.equal(layer.weight.mT @ layer.weight, plain.weight.mT @ plain.weight)
    assert torch.equal(torch.zeros(80, 128).copy_(layer.weight), plain.weight)
    assert torch.equal(F.linear(layer.weight, plain.weight), F.linear(plain.weight, plain.weight))


def train_it(layer):
    layer.weight.requires_grad_(True)
    layer(torch.ones(128))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda layer: layer.weight.mul_(2), "in place"),
        (lambda layer: nn.init.zeros_(layer.weight), "in place"),
        (lambda layer: setattr(layer.weight, "data", torch.zeros(80, 128)), "in place"),
        (lambda layer: save(layer.state_dict()), "save_adapter"),
        (train_it, "cannot be trained"),
    ],
)
def test_what_would_be_wrong_is_refused_in_words(use, message):
    layer, _ = layer_pair()
    with pytest.raises(ValueError, match=message):
        use(layer)


# --- LoRA and loading ---


def with_plain_weights(model):
    """A copy of a model whose NF4 weights are replaced by plain ones."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, NF4Tensor):
            weight = module.weight.dequantize()
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def loss_gradients(model, batch):
    logits = model(*batch)
    F.cross_entropy(logits, torch.arange(len(logits))).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits, gradients


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoders_linear_layers_are_quantised_and_nothing_else(reference, kind):
    _, folder = reference()
    file = load_file(folder / "model.safetensors")
    model = load_model(folder, num_labels=5, quantize=kind)
    quantized = {n: p for n, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    assert quantized.keys() == {name for name in file if name.endswith("_proj.weight")}
    assert len(quantized) == 3 * 7
    for name, parameter in model.named_parameters():
        if name in quantized:
            expected = quantize_nf4(file[name], double=kind == "nf4-double")
            assert torch.equal(parameter.codes, expected.codes)
            assert not parameter.requires_grad
        else:
            assert torch.equal(parameter, file[name])
    total = clinora.count_parameters(load_model(folder, num_labels=5)).total
    assert clinora.count_parameters(model).total == total


def test_weights_are_quantised_as_they_are_in_the_file(reference):
    _, folder = reference()
    full = load_model(folder, num_labels=5, quantize="nf4", dtype=torch.float32)
    half = load_model(folder, num_labels=5, quantize="nf4", dtype=torch.bfloat16)
    for one, other in zip(full.parameters(), half.parameters(), strict=True):
        if isinstance(one, NF4Tensor):
            assert (one.dtype, other.dtype) == (torch.float32, torch.bfloat16)
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scales, other.scales)


def test_a_base_that_cannot_be_quantised_is_refused_by_name(reference):
    _, folder = reference()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*not finite"):
        load_model(folder, num_labels=5, quantize="nf4")
    with pytest.raises(ValueError, match="'int4'"):
        load_model(folder, num_labels=5, quantize="int4")


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_on_nf4_trains_as_on_the_plain_weights(reference, notes, fill_b, variant):
    _, folder = reference()
    model = load_model(folder, num_labels=5, quantize="nf4")
    plain = with_plain_weights(model)
    for adapted in (model, plain):
        torch.manual_seed(2)
        targets = ("q_proj", "v_proj", "down_proj")
        apply_lora(adapted, VARIANTS[variant](rank=2, targets=targets, dropout=0.25))
        fill_b(adapted)
    batch = notes((5, 12, 9, 3))
    torch.manual_seed(3)
    logits, gradients = loss_gradients(model, batch)
    torch.manual_seed(3)
    expected_logits, expected = loss_gradients(plain, batch)
    assert torch.equal(logits, expected_logits)
    trained = {"lora_A", "lora_B", "lora_magnitude_vector"}
    for name in gradients:
        assert name == "score.weight" or not trained.isdisjoint(name.split("."))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_merging_gives_plain_layers_with_the_weight_rounded_once(reference, fill_b, variant):
    _, folder = reference()
    model = load_model(folder, num_labels=5, quantize="nf4", dtype=torch.bfloat16)
    apply_lora(model, VARIANTS[variant](rank=2))
    fill_b(model)
    expected = {}
    for name, layer in lora_layers(model):
        weight = torch.tensor(PUBLISHED)[unpacked(layer.weight)].view(-1, 64)
        weight = (weight * layer.weight.scales[:, None]).view(layer.weight.shape).double()
        merged = weight + layer.lora_B.double() @ layer.lora_A.double() * 8
        if variant == "dora":
            gain = layer.lora_magnitude_vector.double() / merged.norm(dim=1)
            merged = merged * gain[:, None]
        expected[f"{name}.weight"] = merged.bfloat16()
        assert type(merged_weight(layer)) is torch.Tensor
    merge_lora(model)
    assert not list(lora_layers(model))
    for name, weight in expected.items():
        parameter = model.get_parameter(name)
        assert type(parameter) is nn.Parameter
        # float32 and float64 may round to neighbouring bfloat16 numbers.
        torch.testing.assert_close(parameter.data, weight, rtol=2**-7, atol=0)
        assert (parameter != weight).float().mean() < 1e-3
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, NF4Tensor)


def test_an_adapter_is_saved_and_loaded_as_ever(reference, notes, fill_b, tmp_path):
    _, folder = reference()
    model = load_model(folder, num_labels=5, quantize="nf4").eval()
    apply_lora(model, LoRAConfig(rank=2))
    fill_b(model)
    model.head_trained = True
    clinora.save_adapter(model, tmp_path)
    again = load_model(folder, num_labels=5, quantize="nf4").eval()
    clinora.load_adapter(again, tmp_path)
    batch = notes((5, 12))
    assert torch.equal(again(*batch), model(*batch))


def test_a_quantised_module_is_not_trained_whole(reference):
    _, folder = reference()
    model = load_model(folder, num_labels=5, quantize="nf4")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp holds quantised weights"):
        apply_lora(model, LoRAConfig(also_train=("score", "layers.0.mlp")))
    assert not list(lora_layers(model))


# --- Runs ---


@pytest.fixture
def trained(small_run, tmp_path):
    """Train one step on an NF4 base; gives the run's folder, the classifier and three notes."""
    base = small_run.parent / "base"
    texts = [f"visit {i}: chest pain" for i in range(6)]
    notes = [clinora.Note(text, (i % 2,)) for i, text in enumerate(texts)]
    classifier = clinora.Classifier.new(
        base, ("A", "B"), LoRAConfig(rank=2), token_limit=32, device="cpu", quantize="nf4"
    )
    train(classifier, notes[:4], notes[4:], TrainingConfig(steps=1), tmp_path / "run")
    classifier.save(tmp_path / "run")
    return tmp_path / "run", classifier, texts


def has_nf4(classifier):
    return any(isinstance(p, NF4Tensor) for p in classifier.model.parameters())


def test_a_run_is_loaded_with_the_quantisation_that_it_was_trained_with(trained):
    run, classifier, texts = trained
    assert RunRecord.read(run).quantization == "nf4"
    again = clinora.Classifier.load(run, device="cpu")
    assert has_nf4(again)
    assert again(texts) == classifier(texts)
    assert not has_nf4(clinora.Classifier.load(run, device="cpu", quantize="none"))
    double = clinora.Classifier.load(run, device="cpu", quantize="nf4-double")
    assert double.model.quantization == "nf4-double"


def test_a_run_without_a_recorded_quantisation_has_none(small_run, trained):
    assert "quantization" not in json.loads((small_run / "clinora.json").read_text())
    assert RunRecord.read(small_run).quantization == "none"
    assert not has_nf4(clinora.Classifier.load(small_run, device="cpu"))
    assert has_nf4(clinora.Classifier.load(small_run, device="cpu", quantize="nf4"))
    run, _, _ = trained
    values = json.loads((run / "clinora.json").read_text())
    (run / "clinora.json").write_text(json.dumps(values | {"quantization": "int3"}))
    with pytest.raises(CheckpointError, match="'int3'"):
        RunRecord.read(run)


def test_a_quantised_model_cannot_be_trained_without_lora(small_run):
    with pytest.raises(ValueError, match="LoRAConfig"):
        clinora.Classifier.new(small_run.parent / "base", ("A", "B"), None, quantize="nf4")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("eval", []),
        ("predict", ["--notes", "notes.csv", "--out", "out"]),
        pytest.param("serve", ["--port", "0"], marks=pytest.mark.slow),  # imports Gradio
    ],
)
def test_commands_that_load_a_run_pass_the_quantisation_on(command, options, monkeypatch, capsys):
    monkeypatch.setattr("clinora.checkpoint.quantize_nf4", lambda *_, **kind: stop(kind))

    def stop(kind):
        raise ValueError(f"asked for {kind}")

    module = importlib.import_module(f"clinora.commands.{command}")
    for quantize, said in (
        ("nf4", "asked for {'double': False}"),
        ("nf4-double", "asked for {'double': True}"),
        ("int8", "quantize is 'int8': expected one of auto, none, nf4, nf4-double"),
    ):
        with pytest.raises(SystemExit) as exit_:
            module.main(["--quantize", quantize, *options])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
