"""The tokenizer of a Llama's GGUF file, as the files that stand beside a model on the Hub.

GGUF has two kinds. "gpt2" is byte-level BPE: vocabulary and merges become ``tokenizer.json``, and
the pre-tokenizer, which the file only names, is written out here. "llama" is SentencePiece: pieces,
scores and types become ``tokenizer.model``.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from clinora.checkpoint import CheckpointError

# Types of tokens, the same numbers in GGUF and in SentencePiece.
CONTROL = 3
USER_DEFINED = 4
BYTE = 6

LARGEST_SCORE = float(np.finfo(np.float32).max)  # tokenizer.model holds scores in float32

# How GGUF's pre-tokenizers divide a text before BPE.
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIVISIONS = {
    "smollm": {"type": "Digits", "individual_digits": True},
    "llama-bpe": {
        "type": "Split",
        "pattern": {"Regex": LLAMA3_REGEX},
        "behavior": "Isolated",
        "invert": False,
    },
}
# SmolLM2 was pretrained on documents with this token between them. It has no bos token of its own
# (the file names a token of the chat format), and it predicts text best with this one in front.
SMOLLM_SEPARATOR = "<|endoftext|>"


def tokenizer_files(values: dict[str, Any], vocab_size: int, file: Path) -> dict[str, bytes]:
    """Give the tokenizer's files by name.

    Args:
        values: The metadata of the GGUF file.
        vocab_size: V, the number of embeddings.
        file: The GGUF file, for messages.

    Raises:
        CheckpointError: A value is missing or damaged, or the tokenizer is of another kind.
    """
    kind = take(values, "model", str, file)
    tokens = take_list(values, "tokens", str, file)
    types = take_list(values, "token_type", int, file)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file}: expected different tokens, each with a type")
    if min(types, default=0) < 0:
        raise CheckpointError(f"{file} has a token of type {min(types)}: expected 0 or more")
    if len(tokens) > vocab_size:
        raise CheckpointError(f"{file} has {len(tokens)} tokens and {vocab_size} embeddings")
    if kind == "gpt2":
        return byte_level_files(values, file)
    if kind == "llama":
        return {"tokenizer.model": sentencepiece_model(values, file)}
    raise CheckpointError(f"{file} has a tokenizer {kind!r}: expected 'gpt2' or 'llama'")


def take(values: dict[str, Any], name: str, kind: type, file: Path) -> Any:
    """Give a value of the tokenizer's metadata that must exist and have the type ``kind``."""
    key = f"tokenizer.ggml.{name}"
    if not isinstance(values.get(key), kind):
        raise CheckpointError(f"{file}: {key} is missing or has the wrong type")
    return values[key]


def take_list(values: dict[str, Any], name: str, kind: type, file: Path) -> list:
    """Give a list of the tokenizer's metadata that must exist, with elements of type ``kind``."""
    elements = take(values, name, list, file)
    if not all(isinstance(element, kind) for element in elements):
        raise CheckpointError(
            f"{file}: tokenizer.ggml.{name} has elements that are not of type {kind.__name__}"
        )
    return elements


def take_flag(values: dict[str, Any], name: str, default: bool, file: Path) -> bool:
    """Give a boolean of the tokenizer's metadata; ``default`` if the file does not have it."""
    if f"tokenizer.ggml.{name}" not in values:
        return default
    return take(values, name, bool, file)


def token_of(values: dict[str, Any], name: str, file: Path) -> str:
    """Give the token whose id the metadata holds, such as ``bos_token_id``."""
    tokens = take(values, "tokens", list, file)
    index = take(values, name, int, file)
    if not 0 <= index < len(tokens):
        raise CheckpointError(f"{file}: {name} is {index}, and there are {len(tokens)} tokens")
    return tokens[index]


# --- Byte-level BPE -----------------------------------------------------------------------------


def byte_level_files(values: dict[str, Any], file: Path) -> dict[str, bytes]:
    """Give ``tokenizer.json``, and a ``tokenizer_config.json`` for Transformers.

    The JSON is written here and not by the ``tokenizers`` library, whose versions format it
    differently.
    """
    name = take(values, "pre", str, file)
    if name not in DIVISIONS:
        raise CheckpointError(
            f"{file} has the pre-tokenizer {name!r}: expected one of {', '.join(DIVISIONS)}"
        )
    tokens = take(values, "tokens", list, file)
    types = take(values, "token_type", list, file)
    added = []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, USER_DEFINED):
            added.append(
                {
                    "id": index,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": kind == CONTROL,
                }
            )
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": name == "smollm"}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [DIVISIONS[name], {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": first_token_template(values, file),
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": take_list(values, "merges", str, file),
        },
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{file} has a damaged tokenizer: {error}") from None
    # tokenizer.json does not say which tokens are bos and eos; Transformers reads it from here.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token_of(values, "bos_token_id", file),
        "eos_token": token_of(values, "eos_token_id", file),
    }
    settings_text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer.json": text.encode(), "tokenizer_config.json": settings_text.encode()}


def first_token_template(values: dict[str, Any], file: Path) -> dict[str, Any] | None:
    """Give the post-processor that puts the first token before a text; None if there is none.

    As in llama.cpp, a tokenizer of Llama 3 puts its bos token there if the file does not say.
    """
    tokens = take(values, "tokens", list, file)
    if values["tokenizer.ggml.pre"] == "smollm":
        first = SMOLLM_SEPARATOR
        if first not in tokens:
            raise CheckpointError(f"{file} has no token {first}: expected that of SmolLM2")
    elif take_flag(values, "add_bos_token", True, file):
        first = token_of(values, "bos_token_id", file)
    else:
        return None
    before = {"SpecialToken": {"id": first, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    ids = {"id": first, "ids": [tokens.index(first)], "tokens": [first]}
    return {
        "type": "TemplateProcessing",
        "single": [before, text],
        "pair": [before, text, before, other],
        "special_tokens": {first: ids},
    }


# --- SentencePiece ------------------------------------------------------------------------------


def sentencepiece_model(values: dict[str, Any], file: Path) -> bytes:
    """Give ``tokenizer.model``.

    The file is a message of Protocol Buffers, described by sentencepiece_model.proto. It is encoded
    here, because the package protobuf is not needed for anything else. GGUF does not hold the
    settings of the training, which do not matter for encoding.
    """
    if not take_flag(values, "add_bos_token", True, file):
        raise CheckpointError(
            f"{file} has a SentencePiece tokenizer that puts no bos token first: expected one that "
            "does, as Llama's"
        )
    tokens = take(values, "tokens", list, file)
    scores = take_list(values, "scores", float, file)
    types = take(values, "token_type", list, file)
    if len(scores) != len(tokens):
        raise CheckpointError(f"{file} has {len(tokens)} tokens and {len(scores)} scores")
    for token, score in zip(tokens, scores, strict=True):
        if not abs(score) <= LARGEST_SCORE:  # written so that NaN is refused
            raise CheckpointError(
                f"{file}: tokenizer.ggml.scores has {score} for the token {token!r}: expected a "
                "finite number of float32"
            )
    pieces = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        pieces.append((1, message((1, token.encode()), (2, score), (3, kind))))
    unknown = take(values, "unknown_token_id", int, file)
    bos = take(values, "bos_token_id", int, file)
    eos = take(values, "eos_token_id", int, file)
    trainer = message(
        (3, 2),  # model_type: BPE
        (4, len(tokens)),
        (35, BYTE in types),  # byte_fallback
        (40, unknown),
        (41, bos),
        (42, eos),
        (45, token_of(values, "unknown_token_id", file).encode()),
        (46, token_of(values, "bos_token_id", file).encode()),
        (47, token_of(values, "eos_token_id", file).encode()),
    )
    normalizer = message(
        (1, b"identity"),
        (3, take_flag(values, "add_space_prefix", True, file)),
        (4, take_flag(values, "remove_extra_whitespaces", False, file)),
        (5, True),  # escape_whitespaces
    )
    model = message(*pieces, (2, trainer), (3, normalizer))
    try:
        SentencePieceProcessor().LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise CheckpointError(f"{file} has a damaged tokenizer: {error}") from None
    return model


def message(*fields: tuple[int, bool | int | float | bytes]) -> bytes:
    """Encode a message of Protocol Buffers: fields with their numbers.

    Each begins with its number and how its value is encoded: 0 is an integer of variable length, 2
    is bytes after their length, and 5 is a float32.
    """
    encoded = bytearray()
    for number, value in fields:
        if isinstance(value, bytes):
            encoded += integer(8 * number + 2) + integer(len(value)) + value
        elif isinstance(value, float):
            encoded += integer(8 * number + 5) + struct.pack("<f", value)
        else:
            encoded += integer(8 * number) + integer(int(value))
    return bytes(encoded)


def integer(value: int) -> bytes:
    """Encode an integer of at least 0: 7 bits a byte; the eighth says that more bytes follow."""
    encoded = bytearray()
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    encoded.append(value)
    return bytes(encoded)
