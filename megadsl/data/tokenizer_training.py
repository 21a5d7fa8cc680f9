"""Train a SentencePiece model that any text survives: byte fallback, no normalisation, spaces and line ends kept.

FILE.model is the tokenizer; FILE.json says what it was made from. The same corpus and settings give the same bytes.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from megadsl.data.corpus import load_corpus, read_split
from megadsl.data.atomic_files import file_sha256, make_folder, read_json, write_json, written_atomically
from megadsl.data.progress_bar import progress
from megadsl.data.tokenizer import CLS_PIECE, MASK_PIECE, SENTINEL_PIECE, SEP_PIECE
from megadsl.errors import UserError

DEFAULT_VOCAB_SIZE = 2048
# Enough for Megatron's span corruption (15 %, mean 3) at sequence length 512, and 1.6 % of a vocabulary of 2048.
DEFAULT_NUM_SENTINELS = 32
DEFAULT_MAX_LINES = 400_000
_FORMAT = 1
_MAX_LINE_CHARS = 1000
# Part of the result (the unigram trainer sums in thread order), so it must not follow the machine.
_NUM_THREADS = 4


def train_tokenizer(
    corpus: Path, output: Path, *, vocab_size: int = DEFAULT_VOCAB_SIZE, model_type: str = "bpe",
    num_sentinels: int = DEFAULT_NUM_SENTINELS, max_lines: int = DEFAULT_MAX_LINES,
) -> tuple[dict, bool]:
    """Train on the train split of `corpus`; gives the JSON beside the model and whether an earlier, equal one was used again."""
    if output.suffix != ".model":
        raise UserError(f"The tokenizer's file must end in .model, not {output}.")
    if num_sentinels < 0 or max_lines < 1:
        raise UserError("num-sentinels must not be negative and max-lines must be at least 1.")
    manifest = load_corpus(corpus)
    settings = {
        "format": _FORMAT, "type": model_type, "vocab_size": vocab_size, "num_sentinels": num_sentinels,
        "max_lines": max_lines, "corpus_hash": manifest["content_hash"],
    }
    record = output.with_suffix(".json")
    earlier = read_json(record)
    if earlier and earlier.get("settings") == settings and output.is_file() and file_sha256(output) == earlier["sha256"]:
        return earlier, True

    if not manifest["splits"]["train"]["documents"]:
        raise UserError(f"The train split of {corpus} is empty; make the corpus from more text.")
    with progress(f"tokenizer: {model_type}, {vocab_size} pieces", total=1):
        model = train_on_lines(_sample(corpus, max_lines), vocab_size, model_type, num_sentinels)
    make_folder(output.parent)
    record.unlink(missing_ok=True)
    with written_atomically(output) as temporary:
        temporary.write_bytes(model)
    written = {"sha256": file_sha256(output), "settings": settings, "sentencepiece": sentencepiece.__version__}
    write_json(record, written)
    return written, False


def _lines(corpus: Path) -> Iterator[str]:
    # The line end and the tab are pieces of their own, which no other piece crosses; so nothing is lost by learning from
    # lines, and SentencePiece, which drops overlong sentences and those with a tab, drops nothing.
    for text in read_split(corpus, "train"):
        for line in re.split(r"[\n\t]", text):
            for start in range(0, len(line), _MAX_LINE_CHARS):
                yield line[start:start + _MAX_LINE_CHARS]


def _sample(corpus: Path, max_lines: int) -> Iterator[str]:
    """At most `max_lines` lines, evenly spread over the train split."""
    total = sum(1 for _ in _lines(corpus))
    step = -(-total // max_lines)
    return (line.replace("\0", " ") for index, line in enumerate(_lines(corpus)) if step < 2 or index % step == 0)


def train_on_lines(lines: Iterable[str], vocab_size: int, model_type: str, num_sentinels: int) -> bytes:
    """The bytes of a SentencePiece model learnt from `lines`; UserError where they do not go with the vocabulary's size."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type=model_type, vocab_size=vocab_size, minloglevel=2,
            # Any text round-trips: nothing is normalised, no space is added or removed, unknown characters become bytes.
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, byte_fallback=True,
            # Runs of spaces may be one piece (indentation); on Python sources this takes a third off the token count.
            allow_whitespace_only_pieces=True,
            # Megatron's masked datasets read a pad id other than 0 as a token type and break (FACTS.md, section 7).
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="<pad>",
            # Control pieces are never made from text, so "<mask>" in a document stays six characters.
            control_symbols=[MASK_PIECE, CLS_PIECE, SEP_PIECE, *map(SENTINEL_PIECE.format, range(num_sentinels))],
            user_defined_symbols=["\n", "\t"],
            num_threads=_NUM_THREADS,
        )
    except RuntimeError as error:
        raise UserError(_sentence(str(error), vocab_size)) from error
    return model.getvalue()


def _sentence(message: str, vocab_size: int) -> str:
    if too_high := re.search(r"set it to a value <= (\d+)", message):
        return f"The corpus is too small for vocab-size {vocab_size}; set --vocab-size to at most {too_high[1]}."
    if too_low := re.search(r"required_chars. \d+ vs (\d+)", message):
        return (
            f"vocab-size {vocab_size} does not hold the 256 bytes, the special pieces and the characters of the corpus; "
            f"set --vocab-size to more than {too_low[1]}."
        )
    return f"SentencePiece could not train on this corpus: {' '.join(message.split())}"
