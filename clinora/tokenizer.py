"""Text to token ids with the model's own SentencePiece file."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor


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

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Give the ids of a note, bos first, the first ``limit`` of them (None: all)."""
        return [self.bos, *self._pieces.encode(text.strip())][:limit]

    def places(self, text: str, limit: int | None = None) -> list[tuple[int, int]]:
        """Give where each id of ``encode`` begins and ends in the stripped text, in characters.

        The bos stands for nothing, and of the bytes of one character all but the last do.
        """
        found = self._pieces.encode(text.strip(), return_type="offset_mapping")["offsets"]
        return [(0, 0), *found][:limit]

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids; control ids vanish."""
        return self._pieces.decode(ids)
