"""Attention weights: how much each token of a note attends to itself and to those before it.

The decoder computes attention with a fused kernel, which does not give the weights. Here they are
computed again from the queries and keys of the model's own layers.

Shapes: T tokens, H query heads, K key heads, E head width.
"""

import threading

import torch
from torch import Tensor, nn

from clinora.classifier import Classifier
from clinora.llama import rotary_angles, rotate


@torch.no_grad()
def attention_weights(classifier: Classifier, ids: list[int], layer: int) -> Tensor:
    """Compute softmax(q·kᵀ / √E) of every head of one layer (Vaswani et al. 2017, section 3.2.1).

    q and k are rotated (RoPE), and no token attends to a later one. LoRA counts as in a prediction.

    Args:
        classifier: Its model runs once, in evaluation mode.
        ids: T token ids, at least one.
        layer: The layer's number, from 0.

    Returns:
        (H, T, T) float32 on the CPU: head, attending token, attended token. Each row sums to 1.

    Raises:
        ValueError: The model has no such layer.
    """
    model = classifier.model.model
    config = model.config
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"layer {layer}: expected 0 to {config.num_hidden_layers - 1}")
    queries, keys = _queries_and_keys(classifier, ids, model.layers[layer].self_attn)
    q = queries.unflatten(-1, (-1, config.head_dim))  # (T, H, E)
    k = keys.unflatten(-1, (-1, config.head_dim))  # (T, K, E)

    positions = torch.arange(len(ids), device=q.device)
    angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    cos = angles.cos()[:, None]  # (T, 1, E)
    sin = angles.sin()[:, None]
    q = rotate(q, cos, sin).transpose(0, 1)  # (H, T, E)
    k = rotate(k, cos, sin).transpose(0, 1)  # (K, T, E)
    k = k.repeat_interleave(q.size(0) // k.size(0), 0)  # (H, T, E): H/K query heads share a key
    scores = q @ k.transpose(1, 2) / config.head_dim**0.5  # (H, T, T)
    is_later = positions[None, :] > positions[:, None]  # (T, T)
    scores = scores.masked_fill(is_later, float("-inf"))
    return scores.softmax(-1).cpu()


def _queries_and_keys(
    classifier: Classifier, ids: list[int], attention: nn.Module
) -> tuple[Tensor, Tensor]:
    """Run the model and give a layer's queries (T, H·E) and keys (T, K·E), before rotation."""
    model = classifier.model.model
    this_thread = threading.get_ident()
    kept = {}

    def keep(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        if threading.get_ident() == this_thread:  # else another note, classified at the same time
            kept[module] = output[0].float()

    training = model.training
    model.eval()
    hooks = [
        projection.register_forward_hook(keep)
        for projection in (attention.q_proj, attention.k_proj)
    ]
    try:
        with classifier.autocast():
            # Without lengths: with them, the last layer has the query of the last token alone.
            model(torch.tensor([ids], device=model.embed_tokens.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return kept[attention.q_proj], kept[attention.k_proj]
