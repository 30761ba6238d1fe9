"""Convert text to token ids with the model's own SentencePiece file."""

import itertools
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from clinora.files import recognise

SPACE = "\u2581"  # how SentencePiece writes a space
# Every form of Unicode normalisation rewrites one of these, or joins the two spaces.
REWRITTEN = "\ufb01 \uff21  e\u0301"


class Tokenizer:
    """Turns a note into ``[bos] + sentencepiece(note.strip())``, as Llama was trained.

    Control strings inside a note, such as ``</s>``, are encoded as ordinary text, so no note can
    contain a control token. No end-of-sentence token is added.

    Attributes:
        vocab_size: Number of ids, 0 to ``vocab_size`` − 1.
        bos: Id of the token that begins every note.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a SentencePiece model, is damaged, or has no bos token.
    """

    def __init__(self, path: str | Path) -> None:
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder: expected Llama's tokenizer.model")
        data = Path(path).read_bytes()
        kind = recognise(data)
        if kind is not None:
            raise ValueError(f"{path} {kind}")
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
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos: int = self._pieces.bos_id()
        if self.bos < 0:
            raise ValueError(f"{path} has no bos token: it is not Llama's tokenizer.model")
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
        rare_character = self._pieces.encode("\U0010ffff")
        self._reads_whole = rewrites or self._pieces.unk_id() in rare_character

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Give the first ``limit`` ids of a note (None: all), bos first.

        With a limit, only the beginning of the text is tokenised; the ids are the same.
        """
        beginning = self._beginning(text.strip(), limit)
        ids = [self.bos, *self._pieces.encode(beginning)]
        return ids[:limit]

    def places(self, text: str, limit: int | None = None) -> list[tuple[int, int]]:
        """Give where each id of ``encode`` begins and ends in the stripped text, in characters.

        The bos covers no character. If a character is encoded as several bytes, only the last of
        them covers it.
        """
        beginning = self._beginning(text.strip(), limit)
        found = self._pieces.encode(beginning, return_type="offset_mapping")["offsets"]
        return [(0, 0), *found][:limit]

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

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids; control ids are left out."""
        return self._pieces.decode(ids)
