"""Exports and imports put together: a checkpoint's model in fp32 on the CPU with real inputs of its task, compared with the other
library's on them."""

import shutil
from pathlib import Path

from megadsl.checkpoint.export_source import ExportSource
from megadsl.checkpoint.store import Checkpoint, open_checkpoint
from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.tasks.trained import load_trained


def export_source(checkpoint: Checkpoint) -> ExportSource:
    """Load the model of a checkpoint for export; UserError where its task has no counterpart elsewhere."""
    task, model = load_trained(checkpoint, "cpu", precision="fp32")
    sample = task.export_sample()
    if model.tokenizer is None:
        raise UserError(f"{checkpoint.path} has no tokenizer, which every exported model needs.")
    info = checkpoint.info
    facts = {
        "Training": f"{info.iteration} steps, {info.consumed_samples} sequences of {model.config.model.seq_length} tokens",
        "Last loss": "none" if info.loss is None else f"{info.loss:.4f} nats per token",
    }
    return ExportSource(model.config, checkpoint.plan(), model.network, model.definition, sample, model.tokenizer, checkpoint.tokenizer,
                        info.padded_vocab_size, facts)


def export_of_task(checkpoint: Checkpoint, folder: Path) -> tuple[str, float]:
    """Write the model of a task that exports itself -> (class of transformers, largest relative difference of logits)."""
    task, model = load_trained(checkpoint, "cpu", precision="fp32")
    return task.export_huggingface(model, checkpoint.plan(), folder)


def import_from_huggingface(folder: Path, output: Path, scheme: str, tokenizer: Path | None) -> float:
    """Write checkpoint `output` from a Hugging Face folder; the largest relative difference of its logits to transformers'.

    Raises:
        UserError: the folder is no model that can be imported, or the logits differ; `output` is then not there.
    """
    from megadsl.checkpoint.huggingface.importing import import_huggingface
    from megadsl.checkpoint.huggingface.verify import TOLERANCE, load_theirs, offline_transformers, relative_error, their_logits

    transformers = offline_transformers()
    import_huggingface(folder, output, scheme, tokenizer)
    try:
        source = export_source(open_checkpoint(output))
        theirs = their_logits(load_theirs(transformers, source.config.model.family, folder), source.sample)
        error = relative_error(theirs[..., :source.tokenizer.vocab_size], source.logits(source.sample))
        if not error <= TOLERANCE:
            raise UserError(f"The imported model gives other logits than transformers (relative error {error:.1e}); nothing was written.")
    except BaseException:
        shutil.rmtree(output)
        raise
    return error


def import_from_megatron(folder: Path, output: Path, config: Config, trust: bool) -> None:
    """Write checkpoint `output` from a stock GPTModel of Megatron-core, whose shape and tokenizer `config` gives; see import_megatron."""
    from megadsl.checkpoint.megatron import import_megatron
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import initialize_groups
    from megadsl.parallel.launch import Launch
    from megadsl.parallel.topology import Topology

    initialize_groups(Launch.alone(), Topology(1, 1, 1), prepare_device("cpu"))
    import_megatron(folder, output, config, trust)
