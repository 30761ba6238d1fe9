"""Attention weights, against Transformers' own with eager attention."""

import pytest
import torch

import clinora
from clinora.attention import attention_weights
from clinora.lora import LoRAConfig

IDS = [7, 3, 96, 12, 12, 5, 40, 3, 61, 8, 22]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Small(clinora.Classifier):
    """A classifier of random weights without a tokenizer, which attention does not need."""

    def __init__(self, model):
        self.model = model
        self.dtype = torch.float32


def eager(theirs):
    """Transformers' weights: for each layer (H, T, T)."""
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        output = theirs(torch.tensor([IDS]), output_attentions=True)
    return [weights[0] for weights in output.attentions]


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": LLAMA3}], ids=["default", "llama3"])
def test_every_head_of_every_layer_has_the_weights_of_transformers(twins, difference, rope):
    ours, theirs = twins(**rope)
    for layer, expected in enumerate(eager(theirs)):
        found = attention_weights(Small(ours), IDS, layer)
        assert found.shape == (8, len(IDS), len(IDS))
        assert difference(found, expected) < 1e-5


def test_lora_counts_in_the_weights(adapted_twins, difference):
    lora = LoRAConfig(rank=4, targets=("q_proj", "k_proj"), dropout=0.5)
    ours, theirs, _ = adapted_twins(lora)
    theirs.eval()
    expected = eager(theirs.base_model.model)
    with clinora.lora_disabled(ours):
        assert difference(attention_weights(Small(ours), IDS, 1), expected[1]) > 1e-3
    assert difference(attention_weights(Small(ours), IDS, 1), expected[1]) < 1e-5


def test_the_model_is_left_as_it_was(twins):
    ours, _ = twins()
    ours.train()
    attention_weights(Small(ours), IDS, 0)
    assert all(module.training for module in ours.modules())
    assert not any(module._forward_hooks for module in ours.modules())


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_does_not_exist_is_an_error(twins, layer):
    ours, _ = twins()
    with pytest.raises(ValueError, match="0 to 2"):
        attention_weights(Small(ours), IDS, layer)
