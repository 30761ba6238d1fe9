"""Write the token ids that the tests expect, from the independent ``tokenizers`` library.

    python tools/make_token_ids.py tokenizer.model tests/token_ids_llama2.json

It reads the pieces of a SentencePiece BPE model, rebuilds the merges from the scores, and lets
``tokenizers`` encode; the SentencePiece library only lists the pieces.
"""

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
    """Make a BPE of the ``tokenizers`` library out of a SentencePiece file's pieces."""
    model = SentencePieceProcessor(model_file=str(path))
    ids = range(model.vocab_size())
    vocab = {model.id_to_piece(i): i for i in ids}
    special = {i for i in ids if model.is_control(i) or model.is_unknown(i) or model.is_byte(i)}
    scores = {model.id_to_piece(i): model.get_score(i) for i in ids if i not in special}
    # SentencePiece merges the pair whose union scores highest; BPE the pair that comes first.
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(scores, key=scores.get, reverse=True)
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    model, out = map(Path, argv if argv is not None else sys.argv[1:])
    tokenizer = build(model)
    bos = tokenizer.token_to_id("<s>")
    result = {
        "made_by": f"tools/make_token_ids.py with tokenizers {tokenizers.__version__}",
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "texts": [
            {"text": text, "ids": [bos, *tokenizer.encode(text.strip()).ids]} for text in TEXTS
        ],
    }
    out.write_text(json.dumps(result, indent=0) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
