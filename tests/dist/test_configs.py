"""Every file of configs/ trains, at a size that a test can afford: finite, falling loss, validation, a checkpoint that evaluates."""

import json
import math
from pathlib import Path

import pytest
from image_data import prepared
from parallel_data import write_parallel
from ranks import ForkServer
from speech_data import write_speech
from text_data import KINDS, make

from megadsl.config import load_config
from megadsl.tasks.registry import task_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = ["model.hidden_size=32", "model.num_attention_heads=4", "model.seq_length=32", "training.train_iters=30",
         "training.eval_interval=0", "training.eval_iters=2", "checkpoint.save_interval=0", "optimizer.lr_warmup_iters=5",
         "training.global_batch_size=8", "training.micro_batch_size=4", "data.num_workers=0", "monitor.tensorboard=false",
         "optimizer.lr=5.0e-3", "optimizer.min_lr=5.0e-4"]
# Options of `megadsl evaluate` that belong to other tasks.
NOT_ASKED = {"corruptions": False, **dict.fromkeys(
    ("max_samples", "corrupted", "figures", "num_beams", "length_penalty", "hypotheses", "max_examples"))}


def _pictures(folder: Path) -> list[str]:
    return [f"data.datasets=[{prepared(folder / 'pictures', size=28)}]", "tokenizer.model=none", "model.seq_length=17", "task.label_smoothing=0.0"]


def _pairs(folder: Path) -> list[str]:
    """Overrides for a folder with a tokenizer of its own: parallel texts or utterances."""
    return [f"data.datasets=[{folder}]", f"tokenizer.model={folder / 'tokenizer.model'}", "task.label_smoothing=0.0", "task.bucket_batches=2",
            "model.num_decoder_layers=4", "model.hidden_dropout=0.0", "model.decoder_seq_length=48"]


def _parallel(folder: Path) -> list[str]:
    return [*_pairs(write_parallel(folder)), "model.seq_length=48"]


def _speech(folder: Path) -> list[str]:
    return [*_pairs(write_speech(folder, words=(1, 3))), "model.seq_length=20", "task.conv_channels=24", "task.time_mask_width=10"]


# Tasks whose data are neither the small dataset's nor short texts.
OTHER_DATA = {"image_classification": _pictures, "translation": _parallel, "speech_translation": _speech}
ONE_BY_ONE = (*KINDS, *OTHER_DATA)  # samples are what is evaluated, not a stream of tokens


@pytest.fixture(scope="module")
def server():
    with ForkServer() as running:
        yield running


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_trains(file, small_data, tmp_path, server):
    overrides = [
        *SMALL, f"tokenizer.model={small_data.tokenizer}", f"data.datasets=[{small_data.dataset}]", f"training.run_dir={tmp_path}",
    ]
    full = load_config(file)
    task = task_of(full).name
    if task in KINDS:  # data of their own, no run to start from, a number of steps
        data = make(task, tmp_path / "texts", small_data.tokenizer)
        overrides += [f"data.datasets=[{data}]", "checkpoint.init_from=null", "training.train_epochs=null", "optimizer.lr_warmup_fraction=null",
                      "optimizer.lr=2.0e-3", "model.hidden_dropout=0.0", "model.attention_dropout=0.0",
                      *(["task.doc_stride=12", "task.max_query_length=8"] if task == "question_answering" else [])]
    elif task in OTHER_DATA:
        (tmp_path / "source").mkdir()
        overrides += OTHER_DATA[task](tmp_path / "source")
    overrides.append(f"model.num_layers={max(4, full.model.num_layers // 16)}")
    if full.model.family == "encoder_decoder" and task not in OTHER_DATA:
        targets = 32 if task_of(full).options.corruption == "infilling" else 9
        overrides += ["model.num_decoder_layers=6", f"model.decoder_seq_length={targets}"]
    [result] = server.run(1, _train_and_evaluate, load_config(file, overrides))
    losses = [row["train/loss"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "train/loss" in row]
    assert len(losses) == 30 and all(map(math.isfinite, losses))
    fall = 0.1 if task in KINDS else 0.4  # a loss of two labels begins at 0.7
    assert sum(losses[-5:]) / 5 < sum(losses[:3]) / 3 - fall, losses
    assert math.isfinite(result)


def _train_and_evaluate(config) -> float:
    """Train, then the loss of the run's checkpoint by `megadsl evaluate`."""
    import contextlib
    import io

    from megadsl.cli.evaluate import evaluate
    from megadsl.training.loop import train

    train(config)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate(config.training.run_dir, data=config.data.datasets[0].path, split="validation", batch_tokens=512,
                 max_tokens=None if config.task.name in ONE_BY_ONE else 2000,
                 pseudo_tokens=8 if config.model.family == "encoder" and config.task.name not in ONE_BY_ONE else None, tensor_parallel=1, device="cpu",
                 output=None, as_json=True, **NOT_ASKED)
    found = json.loads(printed.getvalue())
    return next(found[name] for name in ("masked_loss", "loss", "f1") if name in found)
