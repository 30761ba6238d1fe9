"""Write the token ids that the tests expect, computed with the independent ``tokenizers`` library.

    python tools/make_token_ids.py tokenizer.model tests/token_ids_llama2.json

It reads the pieces of a SentencePiece BPE model and rebuilds the merges from their scores. Then
``tokenizers`` encodes the texts; the SentencePiece library only lists the pieces.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, normalizers

TEXTS = [
    "Chest pain.",
    "two  spaces, three   spaces, eight        spaces",
    "  spaces at both ends  ",
    "SUBJECTIVE:,  This 23-year-old white female presents,MEDICATIONS: , none.",
    "line\nbreaks\n\nand\ttabs\r\n",
    "BP 120/80, HR 72, T 98.6, SpO2 97% on 2 L, 0.005 mg",
    "1234567890 007 3.14159 1e-5",
    "</s>",
    "a note </s> that goes on <s> after <unk> control strings",
    "<0x0A> [INST] <pad> <|im_end|>",
    "ECG 👨‍⚕️🫀 and 🇩🇪",
    "naïve café Müller Ångström µg ≥ 5 °C ½ ²",
    "胸痛と息切れ 心电图 боль в груди ألم",
    "\u00a0non-breaking\u00a0and\u200bzero-width\ufeff",
    "e\u0301 decomposed, é composed",
    "▁ is the piece for a space ▁▁",
    "WITHOUTSPACESANDALLUPPERCASEPSEUDOHYPOPARATHYROIDISM",
    "\x00\x01\x7f control characters",
    "a",
    ".",
    "'s don't \"quoted\" — dash – dash … dots",
    "https://example.org/path?query=1#part user@example.org",
    "x" * 300,
    "ab " * 200,
    "The patient reports severe chest pain and shortness of breath. ECG shows ST elevation. "
    "Possible myocardial infarction. " * 80,
]


def build(path: Path) -> Tokenizer:
    """Make a BPE tokenizer of ``tokenizers`` from the pieces of a SentencePiece file.

    Raises:
        ValueError: The file is not a SentencePiece model, or is damaged.
        OSError: It cannot be read.
    """
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model or is damaged ({error})") from None
    vocab = {}
    scores = {}
    for i in range(model.vocab_size()):
        piece = model.id_to_piece(i)
        vocab[piece] = i
        is_special = model.is_control(i) or model.is_unknown(i) or model.is_byte(i)
        if not is_special:
            scores[piece] = model.get_score(i)
    # SentencePiece merges the pair whose union has the highest score. BPE merges the pair that
    # comes first in its list, so the list goes from high to low scores.
    merges = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in scores and right in scores:
                merges.append((left, right))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a SentencePiece model")
    parser.add_argument("out", type=Path, help="the file to write")
    args = parser.parse_args(argv)
    try:
        write_ids(args.model, args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"make_token_ids.py: {error}\n")
    return 0


def write_ids(model: Path, out: Path) -> None:
    """Encode the texts and write their ids."""
    tokenizer = build(model)
    bos = tokenizer.token_to_id("<s>")
    texts = []
    for text in TEXTS:
        ids = tokenizer.encode(text.strip()).ids
        texts.append({"text": text, "ids": [bos, *ids]})
    result = {
        "made_by": f"tools/make_token_ids.py with tokenizers {tokenizers.__version__}",
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "texts": texts,
    }
    out.write_text(json.dumps(result, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
