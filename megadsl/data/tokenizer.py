"""A SentencePiece model as a tokenizer: text <-> ids, the special ids, and the hash by which datasets know it.

It has the attributes that megatron.core.datasets asks of a tokenizer (vocab_size, eod, pad, bos, eos, cls, sep, mask,
additional_special_tokens_ids, unique_identifiers), so it can be given to GPTDataset and its relatives as it is.
"""

import hashlib
import os
import re
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from megadsl.errors import UserError

MASK_PIECE, CLS_PIECE, SEP_PIECE = "<mask>", "<cls>", "<sep>"
SENTINEL_PIECE = "<extra_id_{}>"
_SPACE_SYMBOL = "\u2581"
_SURROGATES = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A loaded SentencePiece model.

    With a model of `megadsl tokenizer train`, decode(encode(text)) == text for every text that has an UTF-8 form; a lone
    surrogate has none and becomes U+FFFD. Control pieces such as <mask> never come out of encode, whatever the text holds.

    `content` is the file as it was read: what becomes of the file later does not matter.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.name, self.content = name, model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.unique_identifiers = OrderedDict({"class": type(self).__name__, "sha256": self.sha256})
        self._space_symbol_ids = self._byte_ids(_SPACE_SYMBOL)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a .model file; UserError where there is none or it is broken."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"The tokenizer {path} cannot be read ({error.strerror}); make one with megadsl tokenizer train, or set "
                "tokenizer.model to another file."
            ) from error
        try:
            # SentencePiece takes an empty file for an uninitialised model and fails at the first use only.
            if not model:
                raise RuntimeError("empty file")
            return cls(model, name=str(path))
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model; make one with megadsl tokenizer train.") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without any special id."""
        if not text.isascii():
            text = _SURROGATES.sub("\ufffd", text)
            if self._space_symbol_ids and _SPACE_SYMBOL in text:
                return self._encode_around_space_symbol(text)
        return self._processor.encode(text)

    def encode_with_characters(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids of `encode`, for each the first character that it stands for and the end); the bytes of one character share it."""
        if not text.isascii():
            text = _SURROGATES.sub("\ufffd", text)
            if self._space_symbol_ids and _SPACE_SYMBOL in text:
                return self._encode_with_characters_around_space_symbol(text)
        from sentencepiece.sentencepiece_pb2 import SentencePieceText

        pieces = SentencePieceText.FromString(self._processor.encode(text, out_type="serialized_proto")).pieces
        # It counts bytes of UTF-8: which character holds byte i.
        characters = np.repeat(np.arange(len(text)), [len(one.encode()) for one in text]).tolist() if not text.isascii() else range(len(text))
        covered = [(characters[piece.begin], characters[piece.end - 1] + 1) if piece.end > piece.begin else None for piece in pieces]
        following = (len(text), len(text))
        for index in range(len(covered) - 1, -1, -1):
            # SentencePiece gives a character's surface to the last of its bytes.
            following = covered[index] = covered[index] or following
        return [piece.id for piece in pieces], covered

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control ids (pad, bos, eos, mask, ...) have none."""
        return self._processor.decode(list(ids))

    def pieces(self, ids: list[int]) -> list[str]:
        return [self._processor.id_to_piece(index) for index in ids]

    @cached_property
    def is_text(self) -> np.ndarray:
        """By id, whether text can become this piece (no control piece, not the unknown one): [vocabulary] bool."""
        other = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        return np.array([not any(test(index) for test in other) for index in range(self.vocab_size)])

    @cached_property
    def texts_of_pieces(self) -> list[str]:
        """By id, the text of the piece; of a byte its ASCII character; empty for other bytes and for what is no text."""
        texts = []
        for index, piece in enumerate(self.pieces(range(self.vocab_size))):
            byte = int(piece[3:5], 16) if self._processor.is_byte(index) else None
            text = piece.replace(_SPACE_SYMBOL, " ") if byte is None else chr(byte) if byte < 0x80 else ""
            texts.append(text if self.is_text[index] else "")
        return texts

    @property
    def pad(self) -> int:
        """Id of the padding piece; -1, which no dataset holds, in a foreign model without one."""
        return self._processor.pad_id()

    @property
    def unk(self) -> int:
        return self._processor.unk_id()

    @property
    def bos(self) -> int:
        return self._special(self._processor.bos_id(), "beginning-of-sentence")

    @property
    def eos(self) -> int:
        return self._special(self._processor.eos_id(), "end-of-sentence")

    @property
    def eod(self) -> int:
        """End of document: the piece that separates documents in a dataset."""
        return self.eos

    @property
    def mask(self) -> int:
        return self._special(self._id_of(MASK_PIECE), MASK_PIECE)

    @property
    def cls(self) -> int:
        return self._special(self._id_of(CLS_PIECE), CLS_PIECE)

    @property
    def sep(self) -> int:
        return self._special(self._id_of(SEP_PIECE), SEP_PIECE)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Sentinels for span corruption, in order; empty where the model has none."""
        ids = []
        while (index := self._id_of(SENTINEL_PIECE.format(len(ids)))) >= 0:
            ids.append(index)
        return ids

    @property
    def special_ids(self) -> dict[str, int]:
        """pad, bos, eos, mask, cls and sep, of which a foreign model may lack some."""
        processor = self._processor
        ids = {
            "pad": processor.pad_id(), "bos": processor.bos_id(), "eos": processor.eos_id(),
            "mask": self._id_of(MASK_PIECE), "cls": self._id_of(CLS_PIECE), "sep": self._id_of(SEP_PIECE),
        }
        return {name: index for name, index in ids.items() if index >= 0}

    def _special(self, index: int, piece: str) -> int:
        if index < 0:
            raise UserError(f"The tokenizer {self.name} has no {piece} piece; make one that has it with megadsl tokenizer train.")
        return index

    def _id_of(self, piece: str) -> int:
        index = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else -1

    def _byte_ids(self, text: str) -> list[int]:
        """The byte-fallback ids of `text`; empty for a model that changes spaces anyway or has no byte pieces."""
        ids = [self._id_of(f"<0x{byte:02X}>") for byte in text.encode()]
        keeps_spaces = self._processor.decode(self._processor.encode("  a ")) == "  a "
        return ids if keeps_spaces and min(ids) >= 0 else []

    def _encode_with_characters_around_space_symbol(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, covered, done = [], [], 0
        for part in text.split(_SPACE_SYMBOL):
            if done:
                ids += self._space_symbol_ids
                covered += [(done - 1, done)] * len(self._space_symbol_ids)
            own, places = self.encode_with_characters(part)
            ids += own
            covered += [(begin + done, end + done) for begin, end in places]
            done += len(part) + 1
        return ids, covered

    def _encode_around_space_symbol(self, text: str) -> list[int]:
        # SentencePiece writes a space as U+2581, so a real U+2581 would come back as a space; as bytes it survives.
        first, *others = text.split(_SPACE_SYMBOL)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._space_symbol_ids + self._processor.encode(part)
        return ids
