"""Small tokenizer.json files of Llama 3's kind and SmolLM2's, and a byte-level BPE as an oracle."""

import itertools
import json

import regex
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors, trainers

WORDS = [
    "The patient reports severe chest pain and shortness of breath.",
    "The knee is swollen after a fall; the fracture was reduced under anesthesia.",
    "CT of the abdomen without contrast shows no acute abnormality: 120/80, 37.5 \u00b0C.\n\n",
    "He doesn't smoke. She\u2019s 45 years old; \u2265 5 \u00b5g, na\u00efve.\n",
] * 3

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>"]  # flagged as special
NOT_SPECIAL = ["<tool_call>", "FINDINGS"]  # added tokens that are not
PLAIN = ["\u00fc", "   "]  # added tokens that are no control strings


def llama3_tokenizer() -> Tokenizer:
    """Make a tokenizer of Llama 3's kind; its vocabulary has words that no merges lead to."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    made.train_from_iterator(WORDS, trainer([]))
    described = json.loads(made.to_str())
    vocab = described["model"]["vocab"]
    for word in ("\u0120embolism", "stroke", "\u0120.", "9"):
        vocab.setdefault(word, len(vocab))
    described["model"]["ignore_merges"] = True
    described["decoder"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    made = Tokenizer.from_str(json.dumps(described))
    made.add_special_tokens(CONTROL)
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))],
    )
    spaces_off = processors.ByteLevel(trim_offsets=True)
    made.post_processor = processors.Sequence([spaces_off, template])
    return made


def smollm_tokenizer() -> Tokenizer:
    """Make a tokenizer of SmolLM2's kind: control strings in its vocabulary, and no template."""
    made = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, as_bytes])
    made.train_from_iterator(WORDS, trainer(["<|endoftext|>", "<|im_start|>", "<repo_name>"]))
    return made


def with_added_tokens(made: Tokenizer) -> Tokenizer:
    """Add tokens that are not flagged as special, as some of Llama's relatives have."""
    made.add_tokens([AddedToken(content, normalized=False) for content in NOT_SPECIAL])
    made.add_tokens(PLAIN)
    return made


def trainer(special: list[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip


# How byte-level BPE writes a byte: as itself if it is visible in Latin-1, else from U+0100 on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
INVISIBLE = [byte for byte in range(256) if byte not in VISIBLE]
LETTER_OF = {byte: chr(byte) for byte in VISIBLE}
LETTER_OF |= {byte: chr(0x100 + i) for i, byte in enumerate(INVISIBLE)}


class ByteLevelBPE:
    """Byte-level BPE as Sennrich et al. (2016) and GPT-2 have it, without the tokenizers library.

    It joins the adjacent pair that is first in the list of merges, until no pair is in the list.
    """

    def __init__(self, made: Tokenizer) -> None:
        described = json.loads(made.to_str())
        self.vocab = described["model"]["vocab"]
        self.whole_words = described["model"]["ignore_merges"]
        self.ranks = {tuple(pair): i for i, pair in enumerate(described["model"]["merges"])}
        is_llama3 = described["pre_tokenizer"]["pretokenizers"][0]["type"] == "Split"
        self.parts = [LLAMA3_SPLIT] if is_llama3 else [r"\p{N}|\P{N}+", GPT2_SPLIT]
        self.known = {}

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Give ids, and for each the characters that end in its bytes: from begin to end."""
        words = [text]
        for pattern in self.parts:
            words = [part for word in words for part in regex.findall(pattern, word)]
        assert "".join(words) == text
        finished = [0]  # by number of bytes, the characters that are complete
        for character in text:
            size = len(character.encode())
            finished += [finished[-1]] * (size - 1) + [finished[-1] + 1]
        ids, places, at = [], [], 0
        for word in words:
            for token, size in self.tokens(word):
                ids.append(token)
                places.append((finished[at], finished[at + size]))
                at += size
        return ids, places

    def tokens(self, word: str) -> list[tuple[int, int]]:
        """Give the ids of a word, each with its number of bytes."""
        if word not in self.known:
            letters = "".join(LETTER_OF[byte] for byte in word.encode())
            is_entry = self.whole_words and letters in self.vocab
            pieces = [letters] if is_entry else self.merged(list(letters))
            self.known[word] = [(self.vocab[piece], len(piece)) for piece in pieces]
        return self.known[word]

    def merged(self, pieces: list[str]) -> list[str]:
        while True:
            pairs = list(itertools.pairwise(pieces))
            first = min(pairs, key=lambda pair: self.ranks.get(pair, 10**9), default=None)
            if first not in self.ranks:
                return pieces
            joined, i = [], 0
            while i < len(pieces):
                is_pair = tuple(pieces[i : i + 2]) == first
                joined.append("".join(pieces[i : i + 2]) if is_pair else pieces[i])
                i += 2 if is_pair else 1
            pieces = joined
