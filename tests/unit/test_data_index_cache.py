"""The cached sample index: built once however many ask, found again, rebuilt after a change, and never needed to be writable."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from small_data import make_dataset, run_config

from megadsl.data.index_cache import cached_arrays
from megadsl.data.preprocess import preprocess
from megadsl.tasks.registry import task_of

NAMES = ("first", "second")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("index-cache"))


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A dataset of this test alone, and a cache folder of its own."""
    monkeypatch.setenv("MEGADSL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def built(values: int, calls: list | None = None):
    """A `build` that counts its calls."""
    def build() -> tuple[np.ndarray, ...]:
        if calls is not None:
            calls.append(values)
        return np.arange(values), np.arange(2 * values, dtype=np.uint32).reshape(values, 2)
    return build


def windows(folder: Path, split: str = "train", **training):
    config = run_config(folder, **training)
    return getattr(task_of(config).splits(64), split)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[!.]*")}


def test_built_once_and_mapped_by_the_next(tmp_path):
    calls = []
    first = cached_arrays(tmp_path, "train", {"seed": 1}, NAMES, built(5, calls))
    again = cached_arrays(tmp_path, "train", {"seed": 1}, NAMES, built(5, calls))
    assert len(calls) == 1 and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(first, built(5)(), strict=True))
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other) and not other.flags.writeable and isinstance(other.base, np.memmap)
    cached_arrays(tmp_path, "train", {"seed": 2}, NAMES, built(5, calls))
    cached_arrays(tmp_path, "test", {"seed": 1}, NAMES, built(5, calls))
    assert len(calls) == 3 and len(entries(tmp_path / "index")) == 3


@pytest.mark.parametrize("damage", ["cut short", "missing", "empty", "no array", "a pickle"])
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    calls = []
    cached_arrays(tmp_path, "train", {}, NAMES, built(5, calls))
    [file] = (tmp_path / "index").glob("*/second.npy")
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "a pickle":
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    else:
        file.write_bytes({"cut short": data[:-1], "empty": b"", "no array": b"x" * len(data)}[damage])
    [_, second] = cached_arrays(tmp_path, "train", {}, NAMES, built(5, calls))
    assert len(calls) == 2 and np.array_equal(second, built(5)()[1]) and file.read_bytes() == data


def _race(folder: Path, start, count) -> None:
    def build() -> tuple[np.ndarray, ...]:
        with count.get_lock():
            count.value += 1
        time.sleep(0.3)
        return built(1000)()

    start.wait()
    found = cached_arrays(folder, "train", {}, NAMES, build)
    assert all(np.array_equal(a, b) for a, b in zip(found, built(1000)(), strict=True))


def test_of_many_at_once_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    count, start = context.Value("i", 0), context.Event()
    racers = [context.Process(target=_race, args=(tmp_path, start, count)) for _ in range(6)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 6 and count.value == 1


def test_without_locks_all_build_and_all_are_right(tmp_path, monkeypatch):
    """Lustre mounted without flock says ENOSYS."""
    def refused(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    context = multiprocessing.get_context("fork")
    count, start = context.Value("i", 0), context.Event()
    racers = [context.Process(target=_race, args=(tmp_path, start, count)) for _ in range(4)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 4 and count.value > 1
    assert len(entries(tmp_path / "index")) == 1 and not list((tmp_path / "index").glob(".*.tmp"))


def _killed(folder: Path, building) -> None:
    def build() -> tuple[np.ndarray, ...]:
        building.set()
        time.sleep(60)
        return built(5)()

    cached_arrays(folder, "train", {}, NAMES, build)


def test_a_killed_builder_holds_nobody_up(tmp_path):
    context = multiprocessing.get_context("fork")
    building = context.Event()
    builder = context.Process(target=_killed, args=(tmp_path, building))
    builder.start()
    assert building.wait(30)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    begun = time.monotonic()
    assert np.array_equal(cached_arrays(tmp_path, "train", {}, NAMES, built(5))[0], np.arange(5))
    assert time.monotonic() - begun < 10


def test_where_nothing_can_be_written(tmp_path, monkeypatch, caplog):
    """The dataset's folder first, then the cache folder, then memory with a line. (A file stands where a folder must be: root may
    write into any folder.)"""
    dataset, calls = tmp_path / "dataset", []
    dataset.mkdir()
    (dataset / "index").write_text("in the way")
    monkeypatch.setenv("MEGADSL_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        cached_arrays(dataset, "train", {}, NAMES, built(5, calls))
    assert len(calls) == 1 and len(entries(tmp_path / "cache" / "index")) == 1 and not caplog.records
    monkeypatch.setenv("MEGADSL_CACHE", str(dataset / "index"))
    for _ in range(2):
        assert np.array_equal(cached_arrays(dataset, "train", {}, NAMES, built(5, calls))[0], np.arange(5))
    assert len(calls) == 3
    assert "built in memory" in caplog.records[0].message and "set MEGADSL_CACHE" in caplog.records[0].message
    assert "\n" not in caplog.records[0].message


def test_samples_are_the_same_from_the_cache(folder):
    made = [{key: value.tolist() for key, value in windows(folder)[index].items()} for index in range(40)]
    index = folder / "dataset" / "index"
    assert len(entries(index)) == 1
    mapped = windows(folder)
    assert [{key: value.tolist() for key, value in mapped[position].items()} for position in range(40)] == made
    assert len(entries(index)) == 1
    windows(folder, seed=77)
    windows(folder, split="validation")
    assert len(entries(index)) == 3


def test_a_blend_is_cached_too(folder):
    path = str(folder / "dataset")
    datasets = ({"path": path, "weight": 3}, {"path": path, "weight": 1})
    config = run_config(folder, *datasets)
    first, again = (task_of(config).splits(64).train for _ in range(2))
    assert len(entries(folder / "dataset" / "index")) == 2
    assert all(first[index]["tokens"].tolist() == again[index]["tokens"].tolist() for index in range(30))


def test_another_dataset_in_the_folder_has_another_index(folder, made):
    """Made again from other text: the old index goes with the old data; and a manifest of other content is another key."""
    windows(folder)
    old = entries(folder / "dataset" / "index")
    text = folder / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number}.txt").write_text(f"quite another document {number}\n" * 40)
    preprocess(text, folder / "small.model", folder / "dataset", workers=1)
    assert not entries(folder / "dataset" / "index")
    windows(folder)
    new = entries(folder / "dataset" / "index")
    assert len(new) == 1 and new != old
    manifest = json.loads((folder / "dataset" / "dataset.json").read_text())
    (folder / "dataset" / "dataset.json").write_text(json.dumps(manifest | {"inputs_hash": "another"}))
    windows(folder)
    assert len(entries(folder / "dataset" / "index")) == 2
