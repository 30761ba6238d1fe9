"""The closed forms against counted parameters, an optimiser's tensors and autograd's."""

import json
import math
import re
import time
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from clinora.budget import (
    FineTuning,
    Target,
    base_parameters,
    break_even_rank,
    budget,
    linear_shapes,
    lora_targets,
    saved_activation_bytes,
)
from clinora.commands.budget import main
from clinora.kernels import TILED_FROM
from clinora.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from clinora.lora import LoRAConfig, apply_lora, count_parameters
from clinora.quantize import NF4Tensor, quantize_nf4

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SMALL = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TINYLLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)
LLAMA_2_70B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
CONFIGS = {
    "grouped": SMALL,
    "ungrouped": replace(SMALL, num_key_value_heads=4),
    "head_dim": replace(SMALL, head_dim=20),
    "attention_bias": replace(SMALL, attention_bias=True),
    "mlp_bias": replace(SMALL, mlp_bias=True),
    "tied": replace(SMALL, tie_word_embeddings=True),
}

pytestmark = pytest.mark.usefixtures("one_thread")

any_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def classifier(config: LlamaConfig, tuning: FineTuning) -> LlamaForSequenceClassification:
    """A model with five classes, prepared for training as ``tuning`` says."""
    model = LlamaForSequenceClassification(config, 5)
    if tuning.precision == "bf16" and tuning.method != "full":
        model.bfloat16()
    if tuning.quantize != "none":
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                weight = quantize_nf4(module.weight, double=tuning.quantize == "nf4-double")
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
    if tuning.method == "lora":
        apply_lora(model, LoRAConfig(rank=tuning.rank, targets=tuning.targets))
    if tuning.method == "head":
        model.requires_grad_(False).score.float().requires_grad_(True)
    return model.train()


def run(model: LlamaForSequenceClassification, tuning: FineTuning, lengths: list[int]):
    """Logits of random notes, under autocast where ``tuning`` says so."""
    ids = torch.randint(model.model.config.vocab_size, (tuning.batch, tuning.tokens))
    with torch.autocast("cpu", torch.bfloat16, enabled=tuning.precision == "bf16"):
        return model(ids, torch.tensor(lengths))


def is_copied_parameter(tensor: torch.Tensor) -> bool:
    """Whether autograd made it from a parameter by casting, transposing or viewing alone."""
    node = tensor.grad_fn
    while node is not None and node.name() in ("ToCopyBackward0", "TBackward0", "ViewBackward0"):
        node = node.next_functions[0][0]
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def measured_activation_bytes(config: LlamaConfig, tuning: FineTuning, lengths: list[int]) -> int:
    """The storages that autograd saves in a forward pass, each once, parameters aside."""
    model = classifier(config, tuning)
    parameters = set()
    for p in model.parameters():
        if not isinstance(p, NF4Tensor):
            parameters.add(p.untyped_storage().data_ptr())
    saved = {}  # holds the tensors, or another one could be put at a freed one's address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, NF4Tensor):  # a parameter
            return tensor
        kept = tensor.detach()
        address = kept.untyped_storage().data_ptr()
        if address not in parameters and not is_copied_parameter(tensor):
            saved[address] = kept
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model, tuning, lengths)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.fixture
def config_file(tmp_path):
    """SMALL as a config.json."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **asdict(SMALL)}))
    return path


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "published"),
    [(1, 151_040), (2, 291_840), (4, 573_440), (8, 1_136_640), (16, 2_263_040), (32, 4_515_840),
     (64, 9_021_440)],
)  # fmt: skip
def test_tinyllama_trains_what_peft_trains(rank, published):
    tuning = FineTuning(
        method="lora",
        batch=1,
        tokens=1,
        precision="bf16",
        rank=rank,
        targets=("q_proj", "v_proj"),
    )
    assert budget(TINYLLAMA, tuning, 5).trainable == published


def test_tinyllama_with_all_seven_linears_trains_what_peft_trains():
    assert sum(t.lora for t in lora_targets(TINYLLAMA, 8, LINEARS)) == 6_307_840


def test_tinyllama_has_its_published_sizes():
    assert base_parameters(TINYLLAMA, num_labels=5) == 1_034_522_624
    assert base_parameters(TINYLLAMA, num_labels=None) == 1_100_048_384


@any_config
def test_base_parameters_are_those_counted(config):
    with torch.device("meta"):
        classifier, language = LlamaForSequenceClassification(config, 7), LlamaForCausalLM(config)
    assert base_parameters(config, num_labels=7) == count_parameters(classifier).total
    assert base_parameters(config, num_labels=None) == count_parameters(language).total


@pytest.mark.parametrize("target", LINEARS)
@any_config
def test_lora_parameters_are_those_counted(config, target):
    with torch.device("meta"):
        model = LlamaForSequenceClassification(config, 5)
        apply_lora(model, LoRAConfig(rank=3, targets=(target,)))
    assert lora_targets(config, 3, (target,))[0].lora == count_parameters(model).lora


def shape(width, mlp, layers, heads, key_heads, vocabulary, **other):
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    } | other


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("hub", "parameters", "trained"),
    [
        (shape(4096, 11008, 32, 32, 32, 32_000), 6_738_415_616, 4_194_304 + 5 * 4096),
        (shape(2048, 8192, 16, 32, 8, 128_256, head_dim=64, rope_theta=5e5, rope_scaling=LLAMA3,
               **TIED), 1_235_814_400, 851_968 + 5 * 2048),
        (shape(576, 1536, 30, 9, 3, 49_152, **TIED), 134_515_008, 460_800 + 5 * 576),
        (shape(960, 2560, 32, 15, 5, 49_152, **TIED), 361_821_120, 819_200 + 5 * 960),
    ],
    ids=["Llama-2-7B", "Llama-3.2-1B", "SmolLM2-135M", "SmolLM2-360M"],
)  # fmt: skip
def test_the_family_has_the_published_sizes(tmp_path, capsys, hub, parameters, trained):
    """A folder with config.json alone is enough, whatever the weights' layout."""
    (tmp_path / "config.json").write_text(json.dumps(hub))
    config = LlamaConfig.from_json(tmp_path / "config.json")
    assert base_parameters(config, num_labels=None) == parameters
    assert main([str(tmp_path), "--rank", "8", "--targets", "q_proj", "v_proj"]) == 0
    assert cells(capsys.readouterr().out, table=2)["lora"][0] == f"{trained:,}"


def test_a_70b_llama_is_counted_in_seconds():
    start = time.perf_counter()
    with torch.device("meta"):
        model = LlamaForSequenceClassification(LLAMA_2_70B, 5)
        apply_lora(model, LoRAConfig(rank=16, targets=LINEARS))
    tuning = FineTuning(
        method="lora", batch=8, tokens=4096, precision="bf16", rank=16, targets=LINEARS
    )
    closed = budget(LLAMA_2_70B, tuning, 5)
    counted = count_parameters(model)
    assert (closed.parameters, closed.trainable) == (counted.total, counted.trainable)
    assert time.perf_counter() - start < 5


def test_a_wide_layer_trains_833_times_fewer():
    target = Target("wide", out_features=10_000, in_features=20_000, layers=1, rank=8)
    assert (target.lora, target.full) == (240_000, 200_000_000)
    assert math.floor(target.times_fewer) == 833


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (64, 64), (7, 5), (4, 300), (256, 2048)])
def test_break_even_rank_is_the_last_that_saves(shape):
    out, width = shape
    saving = [r for r in range(out + width) if r * out + r * width < out * width]
    assert break_even_rank(out, width) == saving[-1]


def test_a_target_named_twice_counts_once():
    assert lora_targets(SMALL, 2, ("q_proj", "q_proj")) == lora_targets(SMALL, 2, ("q_proj",))


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_weights_gradients_and_moments_are_those_of_a_step(method, precision):
    tuning = FineTuning(
        method=method, batch=2, tokens=4, precision=precision, rank=2, targets=("q_proj", "up_proj")
    )
    model = classifier(SMALL, tuning)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    F.cross_entropy(run(model, tuning, [4, 3]).float(), torch.tensor([0, 1])).backward()
    optimizer.step()
    moments = [optimizer.state[p][m] for p in trained for m in ("exp_avg", "exp_avg_sq")]

    closed = budget(SMALL, tuning, 5)
    assert closed.weights == sum(p.nbytes for p in model.parameters())
    assert closed.gradients == sum(p.grad.nbytes for p in trained)
    assert closed.optimizer == sum(m.nbytes for m in moments)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_bytes_of_a_target_are_those_of_a_step(method, precision):
    names = ("k_proj", "down_proj")
    tuning = FineTuning(
        method=method, batch=2, tokens=4, precision=precision, rank=2, targets=names
    )
    model = classifier(SMALL, tuning)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    run(model, tuning, [4, 3]).float().square().sum().backward()
    optimizer.step()
    for target in lora_targets(SMALL, 2, names):
        own = [p for n, p in model.named_parameters() if target.name in n.split(".")]
        assert len(own) == SMALL.num_hidden_layers * (3 if method == "lora" else 1)
        moments = [m for p in own for m in optimizer.state.get(p, {}).values() if m.dim() == 2]
        assert target.held_bytes(method, precision) == (
            sum(p.nbytes for p in own),
            sum(p.grad.nbytes for p in own if p.grad is not None),
            sum(m.nbytes for m in moments),
        )


def held_bytes(parameter: torch.Tensor) -> int:
    """The bytes of a parameter; the table of quantised scales, shared by all, does not count."""
    if not isinstance(parameter, NF4Tensor):
        return parameter.nbytes
    parts = [getattr(parameter, part) for part in ("codes", "scales")]
    if parameter.mean_scale is not None:
        parts += [parameter.scales_of_scales, parameter.mean_scale]
    return sum(part.nbytes for part in parts)


@pytest.mark.parametrize("quantize", ["nf4", "nf4-double"])
@pytest.mark.parametrize("method", ["lora", "head"])
def test_bytes_of_a_quantised_base_are_those_it_holds(method, quantize):
    names = ("v_proj", "up_proj")
    tuning = FineTuning(
        method=method, batch=2, tokens=4, precision="bf16", rank=2, targets=names, quantize=quantize
    )
    held = {n: held_bytes(p) for n, p in classifier(SMALL, tuning).named_parameters()}
    assert budget(SMALL, tuning, 5).weights == sum(held.values())
    for target in lora_targets(SMALL, 2, names):
        own = [size for name, size in held.items() if target.name in name.split(".")]
        assert target.held_bytes(method, "bf16", quantize)[0] == sum(own)


@pytest.mark.parametrize("quantize", ["nf4", "nf4-double"])
def test_a_quantised_base_saves_the_same_activations(quantize):
    tuning = FineTuning(
        method="lora", batch=2, tokens=64, precision="bf16", rank=4, targets=LINEARS,
        quantize=quantize,
    )  # fmt: skip
    measured = measured_activation_bytes(SMALL, tuning, [64, 9])
    assert saved_activation_bytes(SMALL, tuning) == measured


ACTIVATION_SHAPES = {
    "4 layers of width 256, 4 × 128, q and v": (
        replace(SMALL, hidden_size=256, intermediate_size=688, num_hidden_layers=4),
        (128, 128, 128, 128),
        ("q_proj", "v_proj"),
    ),
    "8 heads to 2 keys, wide MLP, 2 × 256, q and v": (
        replace(SMALL, hidden_size=128, intermediate_size=1024, num_attention_heads=8),
        (256, 256),
        ("q_proj", "v_proj"),
    ),
    "ragged lengths up to 101, all seven": (
        replace(SMALL, hidden_size=192, intermediate_size=512),
        (101, 1, 57),
        LINEARS,
    ),
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("shape", ACTIVATION_SHAPES.values(), ids=ACTIVATION_SHAPES)
def test_activations_are_within_a_tenth_of_what_autograd_saves(shape, method, precision):
    config, lengths, targets = shape
    tuning = FineTuning(
        method=method,
        batch=len(lengths),
        tokens=max(lengths),
        precision=precision,
        rank=8,
        targets=targets,
    )
    measured = measured_activation_bytes(config, tuning, lengths)
    assert saved_activation_bytes(config, tuning) == pytest.approx(measured, rel=0.10)


PARTS = [("lora", (target,)) for target in LINEARS]
PARTS += [("lora", ("v_proj", "o_proj")), ("lora", ("up_proj", "down_proj"))]  # one feeds the other
PARTS += [("head", ()), ("full", ())]


@pytest.mark.parametrize("layers", [1, 2])  # the first layer and the last are special
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("method", "targets"), PARTS)
def test_activations_are_exact_part_by_part(method, targets, precision, layers):
    config = replace(SMALL, num_hidden_layers=layers)
    tuning = FineTuning(
        method=method, batch=2, tokens=24, precision=precision, rank=4, targets=targets
    )
    measured = measured_activation_bytes(config, tuning, [24, 9])
    assert saved_activation_bytes(config, tuning) == measured


@pytest.mark.parametrize("tokens", [TILED_FROM - 1, TILED_FROM, TILED_FROM + 1])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_activations_are_exact_on_both_sides_of_tiled_attention(method, tokens):
    tuning = FineTuning(
        method=method, batch=3, tokens=tokens, precision="bf16", rank=4, targets=LINEARS
    )
    measured = measured_activation_bytes(SMALL, tuning, [tokens, 9, 1])
    assert saved_activation_bytes(SMALL, tuning) == measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "adapter"}, "method is 'adapter'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"batch": 0}, "batch is 0"),
        ({"targets": ("q",)}, "no layer is named 'q'"),
        ({"targets": ()}, "targets is empty"),
        ({"rank": 0}, "rank 0 does not fit q_proj"),
        ({"quantize": "nf8"}, "quantize is 'nf8'"),
        ({"method": "full", "quantize": "nf4"}, "quantised weights cannot be trained"),
    ],
)
def test_impossible_tunings_are_refused(change, message):
    possible = {"method": "lora", "batch": 1, "tokens": 1, "precision": "bf16", "rank": 1}
    with pytest.raises(ValueError, match=re.escape(message)):
        saved_activation_bytes(SMALL, FineTuning(**possible | {"targets": ("q_proj",)} | change))


# --- the command --------------------------------------------------------------------------------


def cells(printed: str, table: int) -> dict[str, list[str]]:
    """The rows of a printed table by their first cell; cells stand two spaces apart."""
    lines = printed.split("\n\n")[table].splitlines()
    return {row[0]: row[1:] for row in (re.split(" {2,}", line.strip()) for line in lines)}


def test_command_prints_every_target(config_file, capsys):
    main([str(config_file), "--rank", "3", "--targets", "k_proj", "down_proj"])
    rows = cells(capsys.readouterr().out, table=0)
    full = [3 * 16 * 32, 3 * 32 * 80]  # layers · out · in
    lora = [3 * 3 * (16 + 32), 3 * 3 * (32 + 80)]
    assert rows["k_proj"] == ["16 × 32", "3", f"{full[0]:,}", f"{lora[0]:,}", "3.6", "10"]
    assert rows["down_proj"] == ["32 × 80", "3", f"{full[1]:,}", f"{lora[1]:,}", "7.6", "22"]
    assert rows["all"] == [f"{sum(full):,}", f"{sum(lora):,}", "6.4"]


def test_command_counts_all_linear_layers(config_file, capsys):
    main([str(config_file), "--rank", "2", "--targets", "all-linear", "--labels", "5"])
    with torch.device("meta"):
        model = LlamaForSequenceClassification(SMALL, 5)
        apply_lora(model, LoRAConfig(rank=2, targets="all-linear"))
    printed = capsys.readouterr().out
    trained = f"{count_parameters(model).trainable:,}"
    assert cells(printed, table=2)["lora"][0] == trained
    assert tuple(cells(printed, table=0)) == ("target", *LINEARS, "all")


def test_command_prints_every_targets_bytes(tmp_path, capsys):
    shape = asdict(SMALL) | {"hidden_size": 3200, "intermediate_size": 8000, "head_dim": 80}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **shape}))
    main([str(path), "--rank", "50", "--targets", "q_proj", "down_proj"])
    rows = cells(capsys.readouterr().out, table=1)
    # MB: 2 bytes a frozen weight, 4 a trained one; 4 its gradient; 8 its moments
    q, down = 3 * 320 * 3200 / 1e6, 3 * 3200 * 8000 / 1e6
    lora_q, lora_down = 3 * 50 * (320 + 3200) / 1e6, 3 * 50 * (3200 + 8000) / 1e6
    for name, w, r in (
        ("q_proj", q, lora_q),
        ("down_proj", down, lora_down),
        ("all", q + down, lora_q + lora_down),
    ):
        sizes = 2 * w + 4 * r, 4 * r, 8 * r, 4 * w, 4 * w, 8 * w
        assert rows[name] == [f"{size:,.1f}" for size in sizes]


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_command_prints_every_method_in_megabytes(config_file, capsys, method):
    flags = {
        "rank": 5, "batch": 6, "tokens": 700, "labels": 9, "precision": "fp32", "quantize": "nf4",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    main([str(config_file), "--targets", "q_proj", "o_proj", *words])
    labels = flags.pop("labels")
    if method == "full":
        flags.pop("quantize")
    b = budget(SMALL, FineTuning(method=method, targets=("q_proj", "o_proj"), **flags), labels)
    sizes = (b.weights, b.gradients, b.optimizer, b.activations)
    assert cells(capsys.readouterr().out, table=2)[method] == [
        f"{b.trainable:,}",
        f"{100 * b.trainable / b.parameters:.3f}%",
        *(f"{size / 10**6:,.1f}" for size in (*sizes, sum(sizes))),
    ]


def test_command_has_the_defaults_of_lora(config_file, capsys):
    main([str(config_file)])
    by_default = capsys.readouterr().out
    main([str(config_file), "--rank", "8", "--targets", "q_proj", "v_proj"])
    assert by_default == capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targets", "q_proj", "query"], "'query'"),
        (["--rank", "17", "--targets", "k_proj"], "rank 17"),
        (["--labels", "0"], "labels"),
        (["--tokens", "0"], "tokens"),
    ],
)
def test_command_refuses_bad_input_in_a_line(config_file, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        main([str(config_file), *words])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


WIDTH_AS_TEXT = json.dumps({"model_type": "llama", **asdict(SMALL), "hidden_size": "32"})


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "bert"}', WIDTH_AS_TEXT])
def test_command_refuses_a_bad_file_in_a_line(tmp_path, capsys, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        main([str(path)])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(path) in err


def test_linear_shapes_are_those_of_the_layers():
    with torch.device("meta"):
        layer = LlamaForCausalLM(CONFIGS["head_dim"]).model.layers[0]
    found = {
        name.rpartition(".")[2]: tuple(module.weight.shape)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert linear_shapes(CONFIGS["head_dim"]) == found
