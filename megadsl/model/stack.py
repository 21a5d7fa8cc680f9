"""A list of layers made into a model: a SequentialModel (one stage) or DeepSpeed's PipelineModule (several), one definition for both.

Both number their modules by the position in the list, so a parameter's canonical name (entry name + name inside the
layer, for example `decoder.7.self_attention.linear_qkv.weight`) can be mapped both ways and does not depend on the layout.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megadsl.model.activations import Activations
from megadsl.parallel.topology import Topology

WRAPPER_PREFIX = "layer."  # DecoderLayer holds Megatron's TransformerLayer as `layer`; canonical names leave it out


@dataclass(frozen=True)
class LayerEntry:
    """One item of the list.

    Attributes:
        name: canonical prefix of its parameters.
        build: makes the module; None for an entry that only re-uses a tied one.
        tied_key: entries with the same key share one module (the first one builds it).
        tied_forward: called as tied_forward(module, input) instead of module(input).
        takes: of a transformer layer (what a pipeline is cut by): names of all activations that come in, the hidden state first.
    """

    name: str
    build: Callable[[], torch.nn.Module] | None
    tied_key: str | None = None
    tied_forward: Callable | None = None
    takes: tuple[str, ...] = ()


class SequentialModel(torch.nn.Module):
    """All entries in one process: tensors of a batch by name -> what the last entry puts out."""

    def __init__(self, entries: Sequence[LayerEntry]):
        super().__init__()
        self.entries = tuple(entries)
        self.layers = torch.nn.ModuleDict()
        tied = {}
        for index, entry in enumerate(entries):
            if entry.build is None:
                continue
            module = entry.build()
            self.layers[str(index)] = module
            if entry.tied_key is not None:
                tied[entry.tied_key] = module
        self._calls = [self._call(index, entry, tied) for index, entry in enumerate(entries)]

    def _call(self, index: int, entry: LayerEntry, tied: dict) -> Callable:
        module = tied[entry.tied_key] if entry.build is None else self.layers[str(index)]
        if entry.tied_forward is None:
            return module
        return lambda value: entry.tied_forward(module, value)

    def calls(self) -> list[tuple[LayerEntry, Callable]]:
        """(entry, callable) in order, for callers that run the layers themselves (generation, probes)."""
        return list(zip(self.entries, self._calls, strict=True))

    def forward(self, inputs: dict[str, torch.Tensor]) -> Activations:
        value = Activations(inputs)
        for call in self._calls:
            value = call(value)
        return value

    def canonical_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(canonical name, parameter), each parameter once."""
        for name, parameter in self.layers.named_parameters():
            index, _, rest = name.partition(".")
            yield f"{self.entries[int(index)].name}.{rest.removeprefix(WRAPPER_PREFIX)}", parameter


def stage_bounds(entries: Sequence[LayerEntry], num_stages: int) -> list[int]:
    """First entry of every stage, and the end: transformer layers are shared out evenly (earlier stages take the rest).

    What comes before the first layer goes with stage 0, what comes after the last layer with the last stage.
    """
    layers = [index for index, entry in enumerate(entries) if entry.takes]
    size, extra = divmod(len(layers), num_stages)
    starts = [stage * size + min(stage, extra) for stage in range(1, num_stages)]
    return [0, *(layers[start] for start in starts), len(entries)]


def build_pipeline(entries: Sequence[LayerEntry], inputs: tuple[str, ...], loss_function: Callable, topology: Topology):
    """DeepSpeed's PipelineModule over the same entries; only this stage's layers are built.

    Args:
        inputs: names of the batch's tensors that the first entry takes, in the order of the tuple that the loader gives.
        loss_function: (output of the last entry, targets as a tuple) -> loss.
    """
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    builders = {entry.tied_key: entry for entry in entries if entry.tied_key is not None and entry.build is not None}

    class EntrySpec(LayerSpec):
        """A LayerSpec whose module is made by a LayerEntry."""

        def __init__(self, entry: LayerEntry):
            super().__init__(torch.nn.Module)
            self.entry = entry

        def build(self, log=False):
            return self.entry.build()

    class TiedEntrySpec(TiedLayerSpec):
        """The same for a tied entry; the first stage and the last one each hold a copy, DeepSpeed sums their gradients."""

        def __init__(self, entry: LayerEntry):
            super().__init__(entry.tied_key, torch.nn.Module, forward_fn=entry.tied_forward, tied_weight_attr="weight")

        def build(self, log=False):
            return builders[self.key].build()

    class Pipeline(PipelineModule):
        """PipelineModule with our cut and canonical names."""

        def _partition_layers(self, method):
            # DeepSpeed's own cut builds every layer to count parameters, or takes O(layers^2) steps in Python.
            self.parts = stage_bounds(entries, topology.pipeline)
            stage = self._topo.get_coord(self.global_rank).pipe
            self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

        def forward(self, value: torch.Tensor | tuple) -> torch.Tensor | tuple | Activations:
            """Activations within the stage, tuples at its borders; the last stage gives the last entry's output."""
            start, stop = self._local_start, self._local_stop
            value = super().forward(Activations.from_stage(value, entries[start].takes if start else inputs))
            return value if stop == len(entries) else value.to_stage(entries[stop].takes)

        def calls(self) -> list[tuple[LayerEntry, Callable]]:
            """(entry, callable) of this stage in order."""
            return list(zip(entries[self._local_start:self._local_stop], self.forward_funcs, strict=True))

        def canonical_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
            for name, parameter in self.named_parameters():
                head, _, rest = name.partition(".")
                if head == "tied_modules":
                    key, _, rest = rest.partition(".")
                    prefix = builders[key].name
                else:
                    prefix = entries[int(head)].name
                yield f"{prefix}.{rest.removeprefix(WRAPPER_PREFIX)}", parameter

    specs = [EntrySpec(entry) if entry.tied_key is None else TiedEntrySpec(entry) for entry in entries]
    axes = PipeModelDataParallelTopology(topology.pipeline, topology.tensor, topology.data)
    # What DeepSpeed prints while it builds is noise in a job log.
    with contextlib.redirect_stdout(io.StringIO()):
        return Pipeline(specs, topology=axes, loss_fn=loss_function)
