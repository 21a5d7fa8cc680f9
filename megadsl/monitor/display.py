"""What shows the numbers of a run while it goes: TensorBoard's event files, a Weights & Biases run. Both get the same names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megadsl.monitor.names import LAYOUT, LOSS, VALIDATION_LOSS


class Display(Protocol):
    """Made on one rank only. Names have their group before the first slash."""

    def scalars(self, iteration: int, values: dict[str, float]) -> None: ...

    def text(self, name: str, markdown: str, iteration: int) -> None: ...

    def picture(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        """pixels: [height, width, 3] bytes. May be called from another thread."""

    def histogram(self, name: str, values: Sequence[float], iteration: int) -> None: ...

    def hyperparameters(self, values: dict[str, str | int | float | bool]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class EventFiles:
    """TensorBoard's event files, in a folder named like the run, so that TensorBoard shows that name.

    Args:
        first_iteration: what an earlier attempt wrote for this iteration and later ones is not shown any more.
    """

    def __init__(self, folder: Path, first_iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        # The signal before the first step is shown at 0.
        self._events = SummaryWriter(str(folder), purge_step=first_iteration if first_iteration > 1 else 0)
        self._events.add_custom_scalars(LAYOUT)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)

    def text(self, name: str, markdown: str, iteration: int) -> None:
        self._events.add_text(name, markdown, iteration)

    def picture(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        self._events.add_image(name, pixels, iteration, dataformats="HWC")

    def histogram(self, name: str, values: Sequence[float], iteration: int) -> None:
        self._events.add_histogram(name, np.asarray(values), iteration)

    def hyperparameters(self, values: dict[str, str | int | float | bool]) -> None:
        # Not SummaryWriter.add_hparams: that starts a second run, named after the time.
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, dict.fromkeys((LOSS, VALIDATION_LOSS), 0.0)):
            self._events.file_writer.add_summary(summary)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()
