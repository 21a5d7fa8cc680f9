"""Fixtures of the whole suite: a small real dataset, and configs on it.

Run with `make test`. Nothing here is a mock: corpus, tokenizer and dataset are made by the package from Python's own sources.
"""

import os

# Before torch is imported anywhere: many small processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before it is imported: what it asserts is explained as in a test.
pytest.register_assert_rewrite("layout_runs")

from megadsl.config import Config
from megadsl.config.load import parse_config


@dataclass(frozen=True)
class SmallData:
    """A tokenizer of 512 pieces and a dataset of some packages of the standard library."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    def config(self, run_dir: Path, **sections: dict) -> Config:
        """A 6-layer model of width 32 on this data; `sections` overrides, for example model={"num_layers": 2}."""
        values = {
            "model": {"num_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32},
            "tokenizer": {"model": str(self.tokenizer)},
            "data": {"datasets": [str(self.dataset)], "num_workers": 0},
            "optimizer": {"lr": 3e-3, "lr_warmup_iters": 2, "clip_grad": 0.5},
            "training": {"run_dir": str(run_dir), "train_iters": 20, "micro_batch_size": 2, "global_batch_size": 8,
                         "eval_interval": 0, "eval_iters": 2},
            "monitor": {"log_interval": 5, "tensorboard": False},
        }
        for section, changes in sections.items():
            values.setdefault(section, {}).update(changes)
        return parse_config(values)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> SmallData:
    from megadsl.data.corpus import build_corpus
    from megadsl.data.preprocess import preprocess
    from megadsl.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("small-data")
    library = Path(sysconfig.get_paths()["stdlib"])
    build_corpus([str(library / name) for name in ("asyncio", "email", "json", "logging")], folder / "corpus", max_document_chars=4000,
                 fractions=(0.8, 0.1, 0.1))
    train_tokenizer(folder / "corpus", folder / "tokenizer.model", vocab_size=512, model_type="bpe")
    preprocess(folder / "corpus", folder / "tokenizer.model", folder / "dataset", workers=1, seq_length=32)
    return SmallData(folder)


@pytest.fixture(scope="session")
def trained_runs(small_data, tmp_path_factory) -> dict[str, Path]:
    """Two real runs of 12 iterations, by scheme; a test that changes one copies it first."""
    from ranks import run_ranks, train_each

    folder = tmp_path_factory.mktemp("runs")
    configs = [small_data.config(folder / scheme, scheme={"name": scheme}, training={"train_iters": 12, "eval_interval": 4},
                                 checkpoint={"save_interval": 6}, monitor={"log_interval": 2, "tensorboard": True})
               for scheme in ("dslm", "vanilla")]
    run_ranks(1, train_each, configs)
    return {config.scheme.name: Path(config.training.run_dir) for config in configs}


@pytest.fixture(scope="module")
def one_process():
    """Megatron's process groups over this process alone."""
    import torch

    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import destroy_groups, initialize_groups
    from megadsl.parallel.launch import Launch
    from megadsl.parallel.topology import Topology

    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    device = prepare_device("cpu")
    initialize_groups(Launch.alone(), Topology(1, 1, 1), device)
    yield torch.device("cpu")
    destroy_groups()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def make_stack(one_process):
    """Build an initialised model on one process: make_stack(config) -> (stack, plan); stack.definition and stack.task are its own."""
    def make(config: Config, vocab_size: int = 512):
        from megadsl.model.init import initialize
        from megadsl.model.stack import SequentialModel
        from megadsl.tasks.planning import plan_for_run
        from megadsl.tasks.registry import task_of

        plan, task = plan_for_run(config), task_of(config)
        definition = task.define_model(plan, vocab_size)
        stack = SequentialModel(definition.entries)
        stack.definition, stack.task = definition, task
        initialize(stack.canonical_parameters(), config.training.seed, 0, 1)
        return stack, plan

    return make
