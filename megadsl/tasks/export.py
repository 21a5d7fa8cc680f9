"""A checkpoint as what an export or a comparison is about: its model in fp32 on the CPU, with real inputs of its task."""

from megadsl.checkpoint.export_source import ExportSource
from megadsl.checkpoint.store import Checkpoint
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
