"""The base's tokenizer, and the texts as one stream of token ids."""

import io
import random
from collections.abc import Sequence

import numpy as np
import sentencepiece
from tqdm import tqdm

TOKENIZER_LINES = 50_000  # the most lines to train the tokenizer on


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """Train a BPE SentencePiece model with Llama's conventions and return the file's bytes.

    Raises:
        ValueError: There are too few texts for that many pieces.
    """
    model = io.BytesIO()
    lines = []
    for text in texts:
        lines += [line for line in text.split("\n") if line]
    if len(lines) > TOKENIZER_LINES:  # sampled here, because SentencePiece's sampling has no seed
        lines = random.Random(0).sample(lines, TOKENIZER_LINES)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=2**20,  # bytes; the default drops lines of more than 4,192
            num_threads=1,  # the result depends on the number of threads
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"a tokenizer of {vocab_size:,} pieces cannot be trained on these texts: "
            f"{str(error).strip()}"
        ) from None
    return model.getvalue()


def encode(texts: Sequence[str], tokenizer: bytes) -> np.ndarray:
    """Encode all texts and join them, each as ``bos text eos``: (N,) uint16."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    ids = [np.empty(0, np.uint16)]
    for start in tqdm(range(0, len(texts), 256), desc="tokens", unit_scale=256, unit="text"):
        for text in pieces.encode(texts[start : start + 256], add_bos=True, add_eos=True):
            ids.append(np.asarray(text, dtype=np.uint16))
    return np.concatenate(ids)
