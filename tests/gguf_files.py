"""Write small GGUF files as llama.cpp's converter does, with the package ``gguf``."""

import gguf
import numpy as np
from sentencepiece import SentencePieceProcessor

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name):
    """Give a parameter's name in GGUF."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{IN_LAYER[rest]}"


def pairs_from_halves(rows, heads):
    """Reorder rows as ``permute`` of llama.cpp's convert_hf_to_gguf.py does."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def small_tokens(count):
    """Give the metadata of a SentencePiece tokenizer with ``count`` tokens."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"{i}" for i in range(count - 3)]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0, 0.0, 0.0] + [float(-i) for i in range(count - 3)],
        "token_type": [2, 3, 3] + [1] * (count - 3),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def sentencepiece_tokens(path):
    """Give the metadata of a SentencePiece file, as llama.cpp reads it."""
    pieces = SentencePieceProcessor(model_file=str(path))
    types = []
    for i in range(pieces.vocab_size()):
        kinds = (pieces.is_unknown(i), pieces.is_control(i), pieces.is_byte(i))
        types.append({(1, 0, 0): 2, (0, 1, 0): 3, (0, 0, 1): 6}.get(kinds, 1))
    return {
        "model": "llama",
        "tokens": [pieces.id_to_piece(i) for i in range(len(types))],
        "scores": [pieces.get_score(i) for i in range(len(types))],
        "token_type": types,
        "unknown_token_id": pieces.unk_id(),
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
    }


def write_gguf(path, model, kind="F32", tokenizer=None, tensors=None, architecture="llama", **more):
    """Write a Transformers model as a GGUF file.

    Args:
        path: The file.
        model: A LlamaForCausalLM.
        kind: The type of the matrices; vectors are F32, as llama.cpp has them.
        tokenizer: The metadata below tokenizer.ggml; None: of ``small_tokens``.
        tensors: Arrays with their types that replace the model's tensors or are added, by their
            names in GGUF; None leaves a tensor out.
        architecture: general.architecture.
        **more: Further metadata, with two underscores for a point.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (tokenizer or small_tokens(config.vocab_size)).items():
        add(writer, f"tokenizer.ggml.{key}", value)
    for key, value in more.items():
        add(writer, key.replace("__", "."), value)
    written = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().float().numpy()
        if "q_proj" in name:
            array = pairs_from_halves(array, config.num_attention_heads)
        if "k_proj" in name:
            array = pairs_from_halves(array, config.num_key_value_heads)
        written[gguf_name(name)] = array, kind if array.ndim == 2 else "F32"
    for name, tensor in (written | (tensors or {})).items():
        if tensor is None:
            continue
        array, of_kind = tensor
        number = gguf.GGMLQuantizationType[of_kind]
        if array.dtype == np.float32:
            array = gguf.quantize(np.ascontiguousarray(array), number)
        writer.add_tensor(name, array, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    """Add metadata with the type that llama.cpp gives it; an array of NumPy is one of float64."""
    if isinstance(value, np.ndarray):
        of = gguf.GGUFValueType
        writer.add_key_value(key, value.tolist(), of.ARRAY, sub_type=of.FLOAT64)
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}
    kinds[type(value)](key, value)
