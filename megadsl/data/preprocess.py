"""Corpus -> Megatron's mmap dataset, on several processes or, under mpirun or srun, on the ranks of MPI on several nodes.

Documents are written in their order whoever encoded them, so the bytes are the same for any number of workers or ranks.
`encode_batch` (texts -> ids) and `write_documents` (ids -> .bin/.idx) know nothing of processes. Under MPI a rank encodes every
size-th shard (a stretch of lines of the corpus) into a file of its own, which outlives a kill; the first one joins them.
Megatron is imported where it is used: it takes 4 s, and neither a mistake nor a dataset that is already there needs it.
"""

import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

import megadsl
from megadsl.data.corpus import SPLITS, build_corpus, load_corpus, read_lines, read_split
from megadsl.data.dataset import INDEX, FORMAT, MANIFEST, STATISTICS, TOKENIZER
from megadsl.data.atomic_files import fingerprint, make_folder, read_json, sizes_match, write_json, written_atomically
from megadsl.data.progress_bar import progress
from megadsl.data.worker_pool import ordered_map
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.parallel.launch import mpi_world

_BATCH_CHARS = 500_000
# Under MPI: bytes of corpus lines a shard; more where that would make more files than this. Neither depends on the ranks.
_SHARD_BYTES = 1_000_000
_MAX_SHARDS = 4096
_FAILED = 1  # tag of the message "I have failed, stop"
_RECORDED_LIBRARIES = ("megatron-core", "sentencepiece", "numpy")


def preprocess(
    corpus: Path, tokenizer_model: Path, output: Path, *, workers: int | None = None, seq_length: int = 128,
) -> tuple[dict, bool]:
    """Write the dataset folder `output`; gives its dataset.json and whether an earlier, equal one was used again.

    `corpus` is a corpus folder, or any source of `megadsl data corpus`, which then goes through `output`/corpus.
    """
    world = mpi_world()
    if world and workers:
        raise UserError(f"--workers {workers} is for one process; under mpirun every one of the {world.size} ranks is a worker.")
    job = _on_first_rank(world, partial(_prepare, corpus, tokenizer_model, output))
    if world and not job.reused:
        _write_shards(world, job)
    return _on_first_rank(world, partial(_finish, job, world is not None, workers, seq_length))


@dataclass(frozen=True)
class _Job:
    """A dataset to be made. `reused`: the dataset.json of an equal one that is there."""

    corpus: Path
    source: dict
    tokenizer_sha256: str
    vocab_size: int
    dtype: type | None
    output: Path
    inputs_hash: str
    reused: dict | None

    @property
    def shards(self) -> Path:
        """Folder of the shards. What they are made from is in its name, so that no others are ever taken for them."""
        return self.output / f".shards-{self.inputs_hash[:16]}"

    def documents_per_shard(self, split: str) -> int:
        counts = self.source["splits"][split]
        return max(1, counts["documents"] * _SHARD_BYTES // max(1, counts["text_bytes"]), -(-counts["documents"] // _MAX_SHARDS))

    def shard_names(self, split: str) -> list[str]:
        number = -(-self.source["splits"][split]["documents"] // self.documents_per_shard(split))
        return [f"{split}-{index:04d}.npz" for index in range(number)]

    def finished_shards(self) -> set[str]:
        self.shards.mkdir(exist_ok=True)
        return {path.name for path in self.shards.glob("[!.]*.npz")}

    def encoder(self) -> Callable[[list[str]], tuple[np.ndarray, list[int]]]:
        return partial(encode_batch, str(self.output / TOKENIZER), self.tokenizer_sha256, self.dtype)


def _prepare(corpus: Path, tokenizer_model: Path, output: Path) -> _Job:
    tokenizer = Tokenizer.load(tokenizer_model)
    corpus = _corpus_folder(corpus, output)
    source = load_corpus(corpus)
    inputs = fingerprint([FORMAT, source["content_hash"], tokenizer.sha256])
    earlier = read_json(output / MANIFEST)
    reused = bool(earlier) and earlier.get("inputs_hash") == inputs and sizes_match(output, earlier["file_bytes"])
    if not reused:
        if not source["splits"]["train"]["documents"]:
            raise UserError(f"The train split of {corpus} is empty; make the corpus from more text.")
        make_folder(output)
        (output / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(output / INDEX, ignore_errors=True)
        with written_atomically(output / TOKENIZER) as temporary:
            shutil.copyfile(tokenizer_model, temporary)
    return _Job(
        corpus, source, tokenizer.sha256, tokenizer.vocab_size, None if reused else _dtype(tokenizer.vocab_size), output, inputs,
        earlier if reused else None,
    )


def _dtype(vocab_size: int) -> type:
    import megadsl.parallel.device  # noqa: F401  isort: skip  (before Megatron-core)
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)


def _finish(job: _Job, sharded: bool, workers: int | None, seq_length: int) -> tuple[dict, bool]:
    manifest, output = job.reused, job.output
    if not manifest:
        manifest = {
            "format": FORMAT, "inputs_hash": job.inputs_hash, "corpus_hash": job.source["content_hash"], "sources": job.source["sources"],
        }
        manifest |= _write_dataset(job, sharded, workers or len(os.sched_getaffinity(0)))
    earlier_statistics = read_json(output / STATISTICS)
    if not job.reused or not earlier_statistics or earlier_statistics.get("seq_length") != seq_length:
        from megadsl.data.statistics import token_statistics

        write_json(output / STATISTICS, token_statistics(output, manifest, seq_length))
    if not job.reused:
        write_json(output / MANIFEST, manifest)
        shutil.rmtree(job.shards, ignore_errors=True)
    return manifest, job.reused is not None


def encode_batch(tokenizer_model: str, sha256: str, dtype: type, texts: list[str]) -> tuple[np.ndarray, list[int]]:
    """(ids of all `texts`, eod after each; number of ids of each); the tokenizer is loaded once per process."""
    tokenizer = _load_once(tokenizer_model, sha256)
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    ids = np.concatenate([np.asarray(ids, dtype) for ids in documents])
    return ids, [len(ids) for ids in documents]


def write_documents(
    batches: Iterable[tuple[np.ndarray, list[int]]], prefix: Path, dtype: type, done: Callable[[int], None],
) -> dict:
    """Write encoded documents to `prefix`.bin and .idx; gives their counts. `done` hears of the documents of each batch."""
    import megadsl.parallel.device  # noqa: F401  isort: skip  (before Megatron-core)
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    documents = tokens = 0
    with ExitStack() as stack:
        bin_path = stack.enter_context(written_atomically(Path(get_bin_path(str(prefix)))))
        idx_path = stack.enter_context(written_atomically(Path(get_idx_path(str(prefix)))))
        builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype)
        for ids, lengths in batches:
            for document in np.split(ids, np.cumsum(lengths)[:-1]):
                builder.add_document(document, [len(document)])
            documents += len(lengths)
            tokens += len(ids)
            done(len(lengths))
        builder.finalize(str(idx_path))
    return {"documents": documents, "tokens": tokens}


def _corpus_folder(corpus: Path, output: Path) -> Path:
    if (corpus / "corpus.json").is_file() or (corpus / "train.jsonl.zst").is_file():
        return corpus
    build_corpus([str(corpus)], output / "corpus")
    return output / "corpus"


def _write_dataset(job: _Job, sharded: bool, workers: int) -> dict:
    source, output = job.source["splits"], job.output
    documents = {split: source[split]["documents"] for split in SPLITS}
    splits, file_bytes = {}, {}
    with ExitStack() as stack:
        run = None if sharded else stack.enter_context(ordered_map(workers))
        verb = "joining " if sharded else ""
        advance = stack.enter_context(progress(f"dataset: {verb}{sum(documents.values())} documents", sum(documents.values())))
        for split in SPLITS:
            files = [output / f"{split}.bin", output / f"{split}.idx"]
            splits[split] = {"documents": 0, "tokens": 0, "text_bytes": source[split]["text_bytes"]}
            if documents[split]:
                batches = _read_shards(job, split) if sharded else run(job.encoder(), _batches(read_split(job.corpus, split)))
                splits[split] |= write_documents(batches, output / split, job.dtype, advance)
                file_bytes |= {file.name: file.stat().st_size for file in files}
            else:
                # Megatron cannot map an empty file.
                for file in files:
                    file.unlink(missing_ok=True)
    return {
        "tokenizer_sha256": job.tokenizer_sha256, "vocab_size": job.vocab_size, "dtype": np.dtype(job.dtype).name,
        "splits": splits, "file_bytes": file_bytes,
        "versions": {"megadsl": megadsl.__version__, **{name: version(name) for name in _RECORDED_LIBRARIES}},
    }


def _on_first_rank(world, work: Callable):
    """work() on one rank; all ranks get its result or its error. Without MPI: work()."""
    if world is None:
        return work()
    outcome = None
    if world.rank == 0:
        with _bugs_end_all(world):
            try:
                outcome = work(), None
            except (UserError, OSError) as error:
                outcome = None, str(error)
    _wait_for_all(world)
    result, error = world.bcast(outcome, root=0)
    if error:
        raise UserError(error)
    return result


def _nothing() -> None:
    """What the ranks show that show nothing."""


def _write_shards(world, job: _Job) -> None:
    """Encode the shards that are not there yet, every rank its part; ends on all ranks together.

    Raises:
        UserError: on every rank, where one has failed; the sentence names it.
    """
    done = _on_first_rank(world, job.finished_shards)
    missing = [name for split in SPLITS for name in job.shard_names(split) if name not in done]
    mine, error = set(missing[world.rank::world.size]), None
    with ExitStack() as stack:
        show = _nothing
        if world.rank == 0:
            kept = f" ({len(done)} are there)" if done else ""
            advance = stack.enter_context(progress(f"dataset: {len(missing)} shards on {world.size} ranks{kept}", len(missing)))
            shown, due = len(done), time.monotonic()

            def show() -> None:
                nonlocal shown, due
                # Not after every shard: to list a shared folder is not free.
                if time.monotonic() >= due:
                    now, due = len(job.finished_shards()), time.monotonic() + 1
                    advance(now - shown)
                    shown = now

        stack.enter_context(_bugs_end_all(world))
        try:
            for _ in _encode_shards(job, mine):
                show()
                if world.iprobe(tag=_FAILED):
                    break
        except (UserError, OSError) as failure:
            error = f"rank {world.rank} on {socket.gethostname()}: {failure}"
            for other in set(range(world.size)) - {world.rank}:
                world.isend(None, other, tag=_FAILED)
        _wait_for_all(world, show)
    while world.iprobe(tag=_FAILED):
        world.recv(tag=_FAILED)
    errors = [error for error in world.allgather(error) if error]
    if errors:
        raise UserError(f"{errors[0]} (Finished shards are kept: the same command goes on from them.)")


def _encode_shards(job: _Job, mine: set[str]) -> Iterator[str]:
    """Write the shards named in `mine`, in the order of the corpus; yields the name of each."""
    for split in SPLITS:
        lines = read_lines(job.corpus, split) if job.source["splits"][split]["documents"] else ()
        for name, shard in zip(job.shard_names(split), _groups(lines, job.documents_per_shard(split)), strict=True):
            if name in mine:
                batches = list(map(job.encoder(), _batches(json.loads(line)["text"] for line in shard)))
                with written_atomically(job.shards / name) as temporary, temporary.open("wb") as file:
                    np.savez(file, ids=np.concatenate([ids for ids, _ in batches]), lengths=np.concatenate([n for _, n in batches]))
                yield name


def _read_shards(job: _Job, split: str) -> Iterator[tuple[np.ndarray, list[int]]]:
    for name in job.shard_names(split):
        try:
            with np.load(job.shards / name) as shard:
                ids, lengths = shard["ids"], shard["lengths"].tolist()
        except (BadZipFile, ValueError, EOFError, KeyError) as error:
            (job.shards / name).unlink()
            raise UserError(f"The shard {job.shards / name} was damaged ({error}) and has been removed; run the command again.") from error
        yield ids, lengths


def _groups(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    lines = iter(lines)
    while group := list(islice(lines, size)):
        yield group


def _wait_for_all(world, meanwhile: Callable[[], None] = _nothing) -> None:
    """A barrier that leaves the core to those who work: MPI's own would spin."""
    everyone = world.Ibarrier()
    while not everyone.Test():
        time.sleep(0.05)
        meanwhile()


@contextmanager
def _bugs_end_all(world) -> Iterator[None]:
    """An exception that is nobody's mistake but ours ends every rank: the others would wait for this one for ever."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        world.Abort(1)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _load_once(tokenizer_model: str, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(tokenizer_model)
    if tokenizer.sha256 != sha256:
        raise UserError(f"The tokenizer {tokenizer_model} changed while it was in use; run the command again.")
    return tokenizer
