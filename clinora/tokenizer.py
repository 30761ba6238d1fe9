"""Convert text to token ids with the base's own tokenizer file."""

import itertools
import json
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor

from clinora.files import recognise

SPACE = "\u2581"  # how SentencePiece writes a space
# Every form of Unicode normalisation rewrites one of these, or joins the two spaces.
REWRITTEN = "\ufb01 \uff21  e\u0301"
RARE = "\U0010ffff"  # a character that no vocabulary has, except as bytes
VISIBLE = "".join(map(chr, range(33, 127))) + "\u00b5\u00e9\u2265\u6f22\U0001f642"


class Tokenizer:
    """Turns a note into ``first + ids of note.strip()``, as Llama was trained.

    It reads both kinds of files that Llamas have: ``tokenizer.model`` (SentencePiece), and
    ``tokenizer.json`` (the ``tokenizers`` library), if the file's name ends so.

    Control strings inside a note, such as ``</s>`` or ``<|endoftext|>``, are encoded as ordinary
    text, so no note can contain a control token. In ``tokenizer.json`` every added token counts as
    a control string, whether or not it is marked special. Exceptions are runs of white space and
    single characters, which stay tokens.

    No end-of-sentence token is added, not even where the template of ``tokenizer.json`` has one:
    the classifier reads the state of the last token, and that is the last token of the note,
    whether or not the note was cut at the token limit.

    Attributes:
        vocab_size: Number of ids, 0 to ``vocab_size`` − 1.
        first: Ids of the tokens in front of every note: SentencePiece's bos, or what the template
            (``post_processor``) of ``tokenizer.json`` puts there, which may be nothing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a tokenizer, is damaged, or its tokenizer is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder: expected tokenizer.model or tokenizer.json in it"
            )
        data = path.read_bytes()
        kind = recognise(data)
        if kind is not None:
            raise ValueError(f"{path} {kind}")
        self._file = _JSONFile(path, data) if path.suffix == ".json" else _ModelFile(path, data)
        self.vocab_size: int = self._file.vocab_size
        self.first: tuple[int, ...] = self._file.first

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Give the first ``limit`` ids of a note (None: all), ``first`` in front.

        With a limit, a SentencePiece tokenizer may read only the beginning of the text. The ids
        are the same.
        """
        ids = [*self.first, *self._file.ids(text.strip(), limit)]
        return ids[:limit]

    def places(self, text: str, limit: int | None = None) -> list[tuple[int, int]]:
        """Give where each id of ``encode`` begins and ends in the stripped text, in characters.

        The ids in front cover no character. If a character is encoded as several tokens, only the
        last of them covers it: the first n ids stand for the text up to the end of the nth place.

        Bytes that are missing in the vocabulary of ``tokenizer.json`` get no token; in SmolLM2
        these are six control characters. After such a byte, places are inexact up to the end of the
        word.
        """
        places = [*[(0, 0)] * len(self.first), *self._file.places(text.strip(), limit)]
        return places[:limit]

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids; control ids are left out."""
        return self._file.decode(ids)


class _ModelFile:
    """A SentencePiece model: ids and places of a text, at least as many as the limit asks for."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._pieces = SentencePieceProcessor()
        try:
            if not data:
                raise RuntimeError("the file is empty")
            if data.startswith(b"{"):
                raise RuntimeError("it is JSON, as tokenizer.json is")
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model or is damaged ({error}): expected Llama's "
                "tokenizer.model"
            ) from None
        self.vocab_size = self._pieces.vocab_size()
        bos = self._pieces.bos_id()
        if bos < 0:
            raise ValueError(f"{path} has no bos token: it is not Llama's tokenizer.model")
        self.first = (bos,)
        self._longest = 0  # characters of the longest piece: the most that one token stands for
        self._neighbours: set[str] = set()  # pairs of characters that are adjacent in a piece
        for i in range(self.vocab_size):
            if self._pieces.is_byte(i) or self._pieces.is_control(i):
                continue
            piece = self._pieces.id_to_piece(i)
            self._longest = max(self._longest, len(piece))
            for first, second in itertools.pairwise(piece):
                self._neighbours.add(first + second)
        # Llama's tokenizers do not rewrite text, and encode unknown characters as bytes. With
        # another tokenizer one token may stand for many characters: every text is read whole.
        normalised = self._pieces.normalize(REWRITTEN).removeprefix(SPACE)
        rewrites = normalised != REWRITTEN.replace(" ", SPACE)
        rare_character = self._pieces.encode(RARE)
        self._reads_whole = rewrites or self._pieces.unk_id() in rare_character

    def ids(self, text: str, limit: int | None) -> list[int]:
        return self._pieces.encode(self._beginning(text, limit))

    def places(self, text: str, limit: int | None) -> list[tuple[int, int]]:
        beginning = self._beginning(text, limit)
        return self._pieces.encode(beginning, return_type="offset_mapping")["offsets"]

    def decode(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)

    def _beginning(self, text: str, limit: int | None) -> str:
        """Give a beginning of the text that has at least the first ``limit`` tokens of the text.

        SentencePiece joins characters only into pieces of its vocabulary. Two characters that are
        adjacent in no piece are never joined, so the text can be cut between them: what follows
        does not change the tokens before. Without such a place the text is tokenised whole, because
        its first token may depend on its last letter.
        """
        if limit is None or self._reads_whole:
            return text
        enough = limit * self._longest
        rest = text[enough - 1 :].replace(" ", SPACE)
        for i, (before, after) in enumerate(itertools.pairwise(rest)):
            if before + after not in self._neighbours:
                return text[: enough + i]
        return text


class _JSONFile:
    """A ``tokenizer.json``: ids and places of a whole text, whatever the limit.

    Its normaliser and pre-tokenizer may be any, and with some of them the end of a text changes the
    tokens at its beginning.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        try:
            description = json.loads(data)
            if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
                raise ValueError("it has no model")
            added = description.get("added_tokens", [])
            for token in added:  # inside a text, the library finds those that are not special
                token["special"] = token["special"] or _is_control_string(token["content"])
            description["truncation"] = None  # the caller has the limit
            description["padding"] = None
            description["model"].pop("dropout", None)  # it makes ids random, for pretraining
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
            self._tokenizer.encode_special_tokens = True
            with_template = self._tokenizer.encode("a")
            # The template is not needed any more, and post-processors remove spaces from places.
            self._tokenizer.post_processor = None
            self.ids(VISIBLE + RARE)  # a model may lack the token for unknown words that it names
        except Exception as error:  # the library's errors have no class of their own
            raise ValueError(
                f"{path} is not a tokenizer of the tokenizers library or is damaged ({error}): "
                "expected the base's tokenizer.json"
            ) from None
        self._check(path, added)
        front = itertools.takewhile(lambda sequence: sequence is None, with_template.sequence_ids)
        self.first = tuple(with_template.ids[: len(list(front))])
        self.vocab_size = 1 + max([*self._tokenizer.get_vocab().values(), *self.first])

    def ids(self, text: str, _limit: int | None = None) -> list[int]:
        return self._tokenizer.encode(text).ids

    def places(self, text: str, _limit: int | None = None) -> list[tuple[int, int]]:
        places = self._tokenizer.encode(text).offsets
        # Each token of a divided character has the whole character: all but the last give it up.
        next_begin = len(text)
        for i in reversed(range(len(places))):
            begin, end = places[i]
            end = min(end, next_begin)
            next_begin = min(begin, end)
            places[i] = (next_begin, end)
        return places

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def _check(self, path: Path, added: list[dict]) -> None:
        """Check that every text has tokens, that ids are the file's, and that notes are all text.

        Raises:
            ValueError: One of these checks fails.
        """
        for character in VISIBLE:
            if not self.ids(character):
                raise ValueError(
                    f"{path} has no token for {character!r}: expected a tokenizer that encodes "
                    "every character, if need be as bytes"
                )
        unknown = self.ids(RARE)
        for token in added:
            content = token["content"]
            given = self._tokenizer.token_to_id(content)
            if given != token["id"]:
                raise ValueError(
                    f"{path} lists {content!r} with the id {token['id']}, but the tokenizers "
                    f"library numbers it {given}: copy the file again"
                )
            # A token for unknown characters, such as <unk>, may stand for any text.
            if not token["special"] or given in unknown:
                continue
            for text in (content, f"a{content}a", f"a {content} a"):
                if given in self.ids(text):
                    raise ValueError(
                        f"{path} makes the characters {content!r} in a note a control token: such "
                        "a tokenizer is not supported"
                    )


def _is_control_string(content: str) -> bool:
    """Tell whether an added token is more than white space or a single character.

    Llama's relatives have runs of spaces (GPT-NeoX) and rare letters (DeepSeek) as added tokens,
    and were trained on texts that contain them.
    """
    return len(content) > 1 and not content.isspace()
