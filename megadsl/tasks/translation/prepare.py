"""A TSV file of parallel texts -> a dataset folder: token ids of both sides under one vocabulary, split by document.

Columns src_text and tgt_text; id, document and split where there are any. Rows of one document (without one: of one target text) fall
into one split. sources.npz beside target_text/stored.py's files: by split, ids (all sources behind each other) and ends.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.tasks.target_text.rows import SPLITS, BadRows, Row, read_rows, split_of
from megadsl.tasks.target_text.stored import (
    StoredTexts, TextExamples, TokenLists, begin_dataset, earlier_dataset, finish_dataset, write_targets,
)

NAME, MAKER = "parallel", "megadsl data parallel"
SOURCES = "sources.npz"
# Those of a manifest of speech too, whose transcripts and translations are parallel text.
_OPTIONAL = ("id", "document", "split", "src_lang", "tgt_lang", "audio", "n_frames", "speaker")


@dataclass(frozen=True)
class ParallelSettings:
    """What a dataset of parallel text depends on beside the rows."""

    vocab_size: int = 4000
    model_type: str = "unigram"
    max_tokens: int = 128
    fractions: tuple[float, float, float] = (0.96, 0.02, 0.02)
    limit: int | None = None


def prepare_parallel(table: Path, output: Path, settings: ParallelSettings, tokenizer: Path | None = None,
                     skip_bad_rows: bool = False) -> tuple[dict, bool]:
    """Write the dataset folder `output`; its manifest, and whether an earlier, equal one was used again.

    Raises:
        UserError: a row that cannot be used (unless `skip_bad_rows`), or no row that can.
    """
    bad = BadRows(skip_bad_rows)
    rows = list(read_rows(table, ("src_text", "tgt_text"), _OPTIONAL, bad))[:settings.limit]
    inputs = [vars(settings), skip_bad_rows, None if tokenizer is None else tokenizer.read_bytes().hex(), [row.values for row in rows]]
    if earlier := earlier_dataset(output, NAME, inputs):
        return earlier, True
    begin_dataset(output, NAME)
    examples, sources = _examples(rows, settings, bad)
    if not len(examples):
        raise UserError(f"{table} has no row that can be used.")
    loaded = write_targets(output, examples, tokenizer, settings.vocab_size, settings.model_type,
                           [sources[index] for index in examples.of("train")])
    examples = _write_sources(output, examples, sources, loaded, settings, bad)
    return finish_dataset(output, NAME, inputs, {
        "source": str(table), "tokenizer_sha256": loaded.sha256, "vocab_size": loaded.vocab_size, "skipped_rows": dict(bad.reasons),
        "splits": {split: {"examples": len(examples.of(split))} for split in SPLITS},
    }, [SOURCES]), False


def _examples(rows: list[Row], settings: ParallelSettings, bad: BadRows) -> tuple[TextExamples, list[str]]:
    examples, sources = TextExamples(), []
    for number, row in enumerate(rows, 1):
        source, target = row.values["src_text"], row.values["tgt_text"]
        split = split_of(row, row.values.get("document") or target, settings.fractions)
        if not source or not target:
            bad.add(row.where, f"has an empty {'tgt_text' if source else 'src_text'}")
        elif split is None:
            bad.add(row.where, "names an unknown split", f"{row.values['split']}; known are {', '.join(SPLITS)}")
        else:
            examples.add(row.values.get("id") or str(number), split, target, row.where)
            sources.append(source)
    return examples, sources


def _write_sources(output: Path, examples: TextExamples, sources: list[str], tokenizer: Tokenizer, settings: ParallelSettings,
                   bad: BadRows) -> TextExamples:
    """sources.npz, and targets anew without what is too long; the examples that are left."""
    kept, ids = TextExamples(), []
    for index, source in enumerate(sources):
        encoded = tokenizer.encode(source)
        longest = max(len(encoded), len(tokenizer.encode(examples.texts[index])))
        if longest + 1 > settings.max_tokens:
            bad.add(examples.where[index], "is too long", f"{longest + 1} tokens, --max-tokens {settings.max_tokens}")
            continue
        kept.add(examples.ids[index], examples.splits[index], examples.texts[index], examples.where[index])
        ids.append(encoded)
    if len(kept) < len(examples):
        write_targets(output, kept, output / "tokenizer.model", settings.vocab_size, settings.model_type)
    TokenLists.write(output / SOURCES, {split: [ids[index] for index in kept.of(split)] for split in SPLITS})
    return kept


class StoredParallel(StoredTexts):
    """A dataset of parallel text as it is read."""

    def __init__(self, folder: Path):
        super().__init__(folder, NAME, MAKER)
        self._sources = TokenLists(folder / SOURCES)

    def source_lengths(self, split: str) -> np.ndarray:
        """Tokens of every source of a split, without its end."""
        return self._sources.lengths(split)

    def source(self, split: str, index: int) -> np.ndarray:
        """Token ids, without eos: [s]."""
        return self._sources.of(split, index)
