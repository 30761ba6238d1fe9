"""Adapters on disk: PEFT reads ours, we read PEFT's, and damaged ones are refused."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import clinora
from clinora.checkpoint import CheckpointError
from tests.checkpoint_files import IDS, edit_json, edit_tensors, our_logits, reference_logits

CONFIG = clinora.LoRAConfig(rank=4, alpha=8, dropout=0.0)


def adapted(folder, **config):
    """Load a base and apply an adapter with random A and B."""
    torch.manual_seed(3)
    model = clinora.load_model(folder, num_labels=5).eval()
    clinora.apply_lora(model, clinora.LoRAConfig(**{"rank": 4, "alpha": 8, "dropout": 0} | config))
    with torch.no_grad():
        for parameter in clinora.lora_state_dict(model).values():
            parameter.normal_(std=0.2)
    model.head_trained = True
    return model


def peft_adapter(reference, folder, **config):
    """Save an adapter with random A, B and head with PEFT; give PEFT's model and the base."""
    base, base_folder = reference()
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]} | config
    torch.manual_seed(5)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model, base_folder


def test_peft_reads_ours_without_a_missing_or_unexpected_key(reference, tmp_path):
    theirs, folder = reference()
    model = adapted(folder)
    clinora.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of a missing adapter key
        read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        names = peft.get_peft_model_state_dict(read).keys()
    assert names == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    torch.testing.assert_close(our_logits(model), reference_logits(read), rtol=1e-5, atol=1e-5)


def test_auto_peft_reads_ours(reference, tmp_path):
    _, folder = reference()
    model = adapted(folder)
    clinora.save_adapter(model, tmp_path / "adapter")
    read = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=5, pad_token_id=0
    ).eval()
    torch.testing.assert_close(our_logits(model), reference_logits(read), rtol=1e-5, atol=1e-5)


def test_peft_reads_our_rank_stabilised_scaling(reference, tmp_path):
    theirs, folder = reference()
    model = adapted(folder, rank_stabilized=True)
    clinora.save_adapter(model, tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(our_logits(model), reference_logits(read), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"target_modules": r".*\.layers\.[02]\.self_attn\.(q|o)_proj"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1},
        {"target_modules": ["self_attn.k_proj", "model.layers.1.mlp.up_proj"]},
    ],
    ids=["plain", "rslora", "regex", "all-linear", "layers", "layer", "paths"],
)
def test_we_read_what_peft_saves(reference, tmp_path, config):
    theirs, folder = peft_adapter(reference, tmp_path / "adapter", **config)
    model = clinora.load_model(folder, num_labels=5).eval()
    clinora.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-5)
    assert model.head_trained


def test_we_read_names_with_default_and_bfloat16(reference, tmp_path):
    theirs, folder = peft_adapter(reference, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if "lora_" in name:
            name = name.replace(".weight", ".default.weight")
        tensors[name] = tensor.bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    with torch.no_grad():  # round PEFT's own parameters as the file's are
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    model = clinora.load_model(folder, num_labels=5).eval()
    clinora.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(our_logits(model), reference_logits(theirs), rtol=1e-5, atol=1e-5)
    assert {t.dtype for t in clinora.lora_state_dict(model).values()} == {torch.float32}


def test_our_adapter_is_loaded_as_it_was_saved_to_the_bit(reference, tmp_path):
    _, folder = reference()
    model = adapted(folder, also_train=())
    clinora.save_adapter(model, tmp_path / "adapter")
    again = clinora.load_model(folder, num_labels=5).eval()
    clinora.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(our_logits(model), our_logits(again))


def test_an_untrained_head_is_not_saved(reference, tmp_path):
    """Loading an adapter marks the head as trained, so a random one would pass for trained."""
    _, folder = reference(num_labels=None)
    model = clinora.load_model(folder, num_labels=5)
    clinora.apply_lora(model, CONFIG)
    with pytest.raises(ValueError, match=r"never trained: .*head_trained = True"):
        clinora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_head_that_is_adapted_is_not_saved(reference, tmp_path):
    """It used to be written both as a target and as a whole; load_adapter refuses such a file."""
    _, folder = reference()
    model = adapted(folder, targets=("q_proj", "score"), also_train=())
    with pytest.raises(ValueError, match=r"score.* targets.* also_train"):
        clinora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_loading_an_adapter_marks_the_head_as_trained(reference, tmp_path):
    _, folder = reference(num_labels=None)
    clinora.save_adapter(adapted(folder), tmp_path / "adapter")
    model = clinora.load_model(folder, num_labels=5)
    assert not model.head_trained
    clinora.load_adapter(model, tmp_path / "adapter")
    assert model.head_trained


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("rank_pattern", {"q_proj": "2"}),
        ("alpha_pattern", [2]),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", ["h"]),
        ("trainable_token_indices", [1]),
        ("a_key_of_next_year", 1),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", 1),
    ],
)
def test_an_unsupported_option_is_refused_by_name(reference, tmp_path, key, value):
    _, folder = reference()
    clinora.save_adapter(adapted(folder), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **{key: value})
    model = clinora.load_model(folder, num_labels=5)
    with pytest.raises(CheckpointError, match=key):
        clinora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_key_whose_default_would_change_the_result_is_required(reference, tmp_path, key):
    """PEFT's default, lora_alpha 8, would halve the update of an adapter made with 16."""
    _, folder = reference()
    clinora.save_adapter(adapted(folder), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **{key: ...})
    with pytest.raises(CheckpointError, match=key):
        clinora.load_adapter(clinora.load_model(folder, num_labels=5), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("r", True),
        ("r", "4"),
        ("r", 4.0),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_dropout", "0.1"),
        ("target_modules", 5),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]),
        ("modules_to_save", "score"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(reference, tmp_path, key, value):
    """The string "false" is true, and would switch rank-stabilised scaling on."""
    _, folder = reference()
    clinora.save_adapter(adapted(folder), tmp_path)
    edit_json(tmp_path / "adapter_config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {key} is .*, expected"):
        clinora.load_adapter(clinora.load_model(folder, num_labels=5), tmp_path)


def break_rank(folder):
    edit_json(folder / "adapter_config.json", r=2)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def drop_tensor(folder):
    edit_tensors(folder / "adapter_model.safetensors", lambda t: t.pop(next(iter(t))))


def add_tensor(folder):
    edit_tensors(
        folder / "adapter_model.safetensors",
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}),
    )


def add_copy(suffix, copy):
    """Store a tensor a second time, under another name of the same parameter."""

    def add_copies(tensors):
        for name, tensor in list(tensors.items()):
            if name.endswith(suffix):
                tensors[name.replace(suffix, copy)] = tensor + 1

    return lambda folder: edit_tensors(folder / "adapter_model.safetensors", add_copies)


def change_tensors(change):
    """Replace every tensor by a function of it."""

    def change_all(tensors):
        for name, tensor in tensors.items():
            tensors[name] = change(tensor)

    return lambda folder: edit_tensors(folder / "adapter_model.safetensors", change_all)


def one_infinity(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = torch.inf
    return tensor


def target_gpt2(folder):
    edit_json(folder / "adapter_config.json", target_modules=["c_attn"])


def unjson(folder):
    (folder / "adapter_config.json").write_text("{")


def nest(folder):
    (folder / "adapter_config.json").write_text("[" * 100_000)


def make_folder(folder):
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()


def remove(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_rank, "another shape"),
        (truncate, "damaged"),
        (drop_tensor, "missing"),
        (add_tensor, "unexpected"),
        (unjson, "not JSON"),
        (nest, "not JSON"),
        (make_folder, r"adapter_config\.json"),
        (remove, "there is no"),
        (add_copy(".lora_A.weight", ".lora_A.default.weight"), r"lora_A under two names"),
        (add_copy("base_model.model.score.weight", "score.weight"), "score.weight under two names"),
        (change_tensors(lambda t: t.to(torch.int8)), r"another dtype: .*lora_A \(int8, expected"),
        (change_tensors(lambda t: t * torch.nan), "not finite"),
        (change_tensors(one_infinity), "not finite"),
        (target_gpt2, r"adapter_config\.json: .*c_attn"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_adapter_gives_an_error_of_one_line_and_leaves_the_model_unchanged(
    reference, tmp_path, damage, message
):
    _, folder = reference()
    clinora.save_adapter(adapted(folder), tmp_path)
    damage(tmp_path)
    model = clinora.load_model(folder, num_labels=5)
    before = str(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        clinora.load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_that_only_peft_allows_gives_an_error_that_names_the_file(reference, tmp_path):
    _, folder = peft_adapter(reference, tmp_path, r=70)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: .*rank 70"):
        clinora.load_adapter(clinora.load_model(folder, num_labels=5), tmp_path)


def test_loading_a_second_adapter_is_refused(reference, tmp_path):
    _, folder = reference()
    model = adapted(folder)
    clinora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="already"):
        clinora.load_adapter(model, tmp_path)


def test_adapter_of_another_base_is_refused_with_both_names(reference, tmp_path):
    _, folder = reference()
    _, wider = reference(hidden_size=96, head_dim=8)
    clinora.save_adapter(adapted(folder), tmp_path)
    with pytest.raises(CheckpointError, match=rf"{folder.name}.*{wider.name}"):
        clinora.load_adapter(clinora.load_model(wider, num_labels=5), tmp_path)


def test_adapter_of_other_classes_is_refused(reference, tmp_path):
    _, folder = reference(num_labels=None)
    clinora.save_adapter(adapted(folder), tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight .*5 × 64.*3 × 64"):
        clinora.load_adapter(clinora.load_model(folder, num_labels=3), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_our_causal_lm(reference, tmp_path, tied):
    theirs, folder = reference(num_labels=None, tie_word_embeddings=tied)
    model = clinora.load_model(folder).eval()
    clinora.apply_lora(model, CONFIG)
    with torch.no_grad():
        for tensor in clinora.lora_state_dict(model).values():
            tensor.normal_(std=0.2)
        base = theirs(IDS[:1]).logits
    clinora.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert type(read) is peft.PeftModelForCausalLM
    with torch.no_grad():
        ours = model(IDS[:1])
        logits = read(IDS[:1]).logits
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, base, atol=0.01)


@pytest.fixture
def bert():
    """A small random BERT, the same at every call."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, num_labels=3,
    )  # fmt: skip

    def make():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()

    return make


@pytest.fixture
def adapted_bert(bert):
    model = bert()
    lora = clinora.LoRAConfig(rank=4, targets=("query", "value"), also_train=("classifier",))
    clinora.apply_lora(model, lora)
    with torch.no_grad():
        for tensor in clinora.lora_state_dict(model).values():
            tensor.normal_(std=0.2)
    return model


def test_the_adapter_of_a_bert_is_loaded_as_it_was_saved(bert, adapted_bert, tmp_path):
    clinora.save_adapter(adapted_bert, tmp_path)
    again = bert()
    clinora.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(adapted_bert(IDS).logits, again(IDS).logits)


def test_peft_reads_our_bert(bert, adapted_bert, tmp_path):
    clinora.save_adapter(adapted_bert, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    with torch.no_grad():
        ours = adapted_bert(IDS).logits
        theirs = read(IDS).logits
        base = bert()(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs, base, atol=0.01)


class Twice(torch.nn.Module):
    """One linear layer that is used in two places."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x).relu())


# --- Models of Transformers, adapted by PEFT ---

TINY = {"vocab_size": 50, "num_labels": 3}
BERT = TINY | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def distilbert():
    shape = transformers.DistilBertConfig(**TINY, dim=16, hidden_dim=24, n_layers=2, n_heads=2)
    return transformers.DistilBertForSequenceClassification(shape)


def roberta():
    shape = transformers.RobertaConfig(**BERT, max_position_embeddings=40, pad_token_id=0)
    return transformers.RobertaForSequenceClassification(shape)


def electra():
    shape = transformers.ElectraConfig(**BERT, embedding_size=16)
    return transformers.ElectraForSequenceClassification(shape)


ADAPTED = {
    # PEFT matches "classifier", which SEQ_CLS adds, by any ending: also pre_classifier.
    "a head of two modules": (distilbert, {"target_modules": ["q_lin", "v_lin"]}),
    "targets of other models too": (distilbert, {"target_modules": ["q_lin", "q_proj", "c_attn"]}),
    # The head holds a layer named dense, which is saved whole and not adapted.
    "a target that is also in the head": (roberta, {"target_modules": ["dense", "query"]}),
    "a pattern": (roberta, {"target_modules": r".*\.layer\.1\..*\.(query|dense)"}),
    "all linear layers": (electra, {"target_modules": "all-linear"}),
    "a module named by its ending": (
        electra, {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_that_peft_writes_for_another_model_is_read_as_peft_reads_it(tmp_path, kind):
    build, options = ADAPTED[kind]
    torch.manual_seed(0)
    base = build().eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(task_type="SEQ_CLS", r=4, **options)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(3, 50, (2, 9))
    expected = theirs(ids).logits

    ours = copy.deepcopy(base)
    clinora.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)

    clinora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_lacks_a_layer_is_refused(tmp_path):
    theirs = peft.get_peft_model(roberta(), peft.LoraConfig(r=4, target_modules=["query"]))
    theirs.save_pretrained(tmp_path)

    def remove_a_layer(tensors):
        for name in [name for name in tensors if ".layer.1." in name]:
            del tensors[name]

    edit_tensors(tmp_path / "adapter_model.safetensors", remove_a_layer)
    with pytest.raises(CheckpointError, match=r"missing: .*layer\.1\..*query"):
        clinora.load_adapter(roberta(), tmp_path)


def test_the_adapter_of_a_layer_used_twice_is_loaded_as_it_was_saved(tmp_path, fill_b):
    """A and B have two names each, and safetensors refuses to write tensors that share memory."""
    model = Twice()
    x = torch.randn(3, 6)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = clinora.LoRAConfig(rank=2, targets=("first", "second"), also_train=(), dropout=0)
    clinora.apply_lora(model, config)
    clinora.save_adapter(fill_b(model), tmp_path)
    again = Twice()
    again.load_state_dict(base)
    clinora.load_adapter(again, tmp_path)
    assert again.first is again.second
    assert torch.equal(again(x), model(x))
    assert not torch.equal(again.first(x), x @ base["first.weight"].T)


def test_a_part_of_a_model_is_not_saved(reference, tmp_path):
    _, folder = reference()
    with pytest.raises(ValueError, match="whole model"):
        clinora.save_adapter(adapted(folder).model, tmp_path / "adapter")
