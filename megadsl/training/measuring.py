"""What is measured of training steps: the signal in the model and the optimizer's steps, on the steps that are asked for.

Between them nothing is left in the model: hooks are set for the first micro-batch of a measured step and taken away again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megadsl.model.stack import LayerEntry
from megadsl.monitor.parameters import ParameterProbes
from megadsl.monitor.probes import SignalProbes
from megadsl.monitor.signal import SignalRecord, points_of
from megadsl.parallel.groups import broadcast_over_stages
from megadsl.parallel.topology import Coordinate, Topology
from megadsl.schemes.plan import SignalPlan
from megadsl.tasks.task import Batch, Task
from megadsl.training.optimizer import GuardedAdamW
from megadsl.training.state import EngineState


class Measuring:
    """Measures steps of an engine. Made on all ranks together.

    Args:
        calls: (entry, module) of this stage.
        optimizer: whose steps are measured.
        is_frozen: of a parameter's name: it stands still by intent, and is not measured.
    """

    def __init__(self, task: Task, plan: SignalPlan, calls: list[tuple[LayerEntry, Callable]], embedding: str, state: EngineState,
                 optimizer: GuardedAdamW, topology: Topology, coordinate: Coordinate, device: torch.device, is_frozen: Callable[[str], bool]):
        self._task, self._topology, self._optimizer = task, topology, optimizer
        self._probes = SignalProbes(calls, points_of(plan), embedding, device, tensor_size=topology.tensor)
        self._parameters = ParameterProbes([one for one in state.fragments if not is_frozen(one.name)], device, coordinate.tensor, topology.tensor)
        # The first micro-batch of the global batch, which data rank 0 has: what is measured does not depend on the layout.
        self._measures = coordinate.data == 0
        self._latest: int | None = None
        self._active = False

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """A step that is measured; iteration: steps done before it."""
        self._latest, self._active, self._optimizer.around = iteration, True, self._parameters.around
        try:
            yield
        finally:
            self._active, self._optimizer.around = False, None

    @contextmanager
    def micro_batch(self, batch: Batch | None) -> Iterator[None]:
        """Forward and backward of the micro-batch that is measured, where this step is; None: this stage reads none."""
        if not (self._active and self._measures):
            yield
            return
        real = {} if batch is None else self._task.real_positions(batch)
        if self._topology.pipeline > 2:  # stages in the middle read no data
            real = broadcast_over_stages(real)
        with self._probes.watching(real):
            yield

    def forward(self, first: bool) -> None:
        """Told before every forward pass of a pipelined step: whether it is of the step's first micro-batch."""
        self._probes.recording = first

    def read(self) -> SignalRecord | None:
        """What was measured since the last `read`, on all ranks together; None where nothing was."""
        if self._latest is None:
            return None
        iteration, self._latest = self._latest, None
        return self._probes.read(iteration, self._parameters.read())
