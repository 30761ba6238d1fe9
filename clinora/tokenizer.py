"""Text to token ids with the model's own SentencePiece file."""

import itertools
from pathlib import Path

from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # how SentencePiece writes a space
# Every form of Unicode normalisation rewrites one of these, or joins the two spaces.
REWRITTEN = "\ufb01 \uff21  e\u0301"


class Tokenizer:
    """Turns a note into ``[bos] + sentencepiece(note.strip())``, as Llama was trained.

    Control strings inside a note, such as ``</s>``, are spelled out as text: no note can end
    itself. No end-of-sentence token is added.

    Attributes:
        vocab_size: Number of ids, 0 to ``vocab_size`` − 1.
        bos: Id of the token that begins every note.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no SentencePiece model, is damaged, or has no bos token.
    """

    def __init__(self, path: str | Path) -> None:
        data = Path(path).read_bytes()
        self._pieces = SentencePieceProcessor()
        try:
            if not data:
                raise RuntimeError("the file is empty")
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is no SentencePiece model or is damaged ({error}): expected Llama's "
                "tokenizer.model"
            ) from None
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos: int = self._pieces.bos_id()
        if self.bos < 0:
            raise ValueError(f"{path} has no bos token: it is not a Llama's tokenizer.model")
        pieces = [
            self._pieces.id_to_piece(i)
            for i in range(self.vocab_size)
            if not self._pieces.is_byte(i) and not self._pieces.is_control(i)
        ]
        self._longest = max(map(len, pieces))  # characters that one token stands for, at most
        self._neighbours = {a + b for piece in pieces for a, b in itertools.pairwise(piece)}
        # Llama's tokenizers rewrite nothing and spell unknown characters in bytes. Others may write
        # many characters as one token: they read every text whole.
        rewritten = self._pieces.normalize(REWRITTEN).removeprefix(SPACE)
        spelled = self._pieces.encode("\U0010ffff")
        self._reads_whole = (
            rewritten != REWRITTEN.replace(" ", SPACE) or self._pieces.unk_id() in spelled
        )

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Give the ids of a note, bos first, the first ``limit`` of them (None: all).

        With a limit only a beginning of the text is tokenised; the ids are the same.
        """
        return [self.bos, *self._pieces.encode(self._beginning(text.strip(), limit))][:limit]

    def places(self, text: str, limit: int | None = None) -> list[tuple[int, int]]:
        """Give where each id of ``encode`` begins and ends in the stripped text, in characters.

        The bos stands for nothing, and of the bytes of one character all but the last do.
        """
        beginning = self._beginning(text.strip(), limit)
        found = self._pieces.encode(beginning, return_type="offset_mapping")["offsets"]
        return [(0, 0), *found][:limit]

    def _beginning(self, text: str, limit: int | None) -> str:
        """Give a beginning of a text whose tokens are the text's first ones, at least ``limit``.

        SentencePiece joins neighbours only into pieces of its vocabulary. Two characters that stand
        side by side in no piece are never joined, so that nothing behind them changes what is
        before. A run of letters without such a place is tokenised whole: its first token may depend
        on its last letter.
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
        """Give the text of ids; control ids vanish."""
        return self._pieces.decode(ids)
