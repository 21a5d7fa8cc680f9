"""Progress of a run: a bar on a terminal, one plain line per log interval in a job log."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class LogRecord:
    """What one log line says; loss and rates are means over the interval since the last line.

    tokens_per_second counts what is not padding; `padding` is the share of positions that are. memory_bytes: of the rank that held
    most. tflops: a device's. peak_tflops: what the device could do at most, None where that is not known.
    """

    iteration: int
    train_iters: int
    loss: float
    lr: float
    gradient_norm: float
    tokens_per_second: float
    padding: float
    tflops: float
    memory_bytes: int
    seconds_per_iteration: float
    skipped: int
    peak_tflops: float | None = None

    def text(self) -> str:
        width, seconds_left = len(str(self.train_iters)), self.seconds_per_iteration * (self.train_iters - self.iteration)
        line = (
            f"iteration {self.iteration:>{width}}/{self.train_iters} | loss {self.loss:.4f} | lr {self.lr:.3e} | "
            f"grad norm {self.gradient_norm:.3f} | {self.tokens_per_second:,.0f} tokens/s | {self.tflops:.4g} TFLOP/s | "
            f"peak memory {self.memory_bytes / 2**30:.2f} GiB | ETA {duration(seconds_left)}"
        )
        if self.peak_tflops:
            line += f" | MFU {self.tflops / self.peak_tflops:.1%}"
        padding = f" | padding {self.padding:.1%}" if self.padding else ""
        return line + padding + (f" | skipped {self.skipped}" if self.skipped else "")

    def scalars(self) -> dict[str, float]:
        """Throughput for TensorBoard (loss, lr and norm are written every iteration)."""
        mfu = {"throughput/mfu": self.tflops / self.peak_tflops} if self.peak_tflops else {}
        return {
            "throughput/tokens_per_second": self.tokens_per_second, "throughput/padding_share": self.padding,
            "throughput/tflops": self.tflops, "throughput/seconds_per_iteration": self.seconds_per_iteration,
            "memory/peak_gib": self.memory_bytes / 2**30, "train/skipped_iterations": float(self.skipped),
            **mfu,
        }


class Progress:
    """Shows a run. `with Progress(...) as progress`; on ranks other than the first it shows nothing."""

    def __init__(self, train_iters: int, first_iteration: int, enabled: bool):
        self._enabled = enabled
        self._bar = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress as RichProgress, TextColumn, TimeRemainingColumn

            self._bar = RichProgress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=train_iters, completed=first_iteration, note="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, iteration: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, note=f"loss {loss:.3f}")

    def log(self, text: str) -> None:
        """A line of the job log (above the bar, where there is one)."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)


def duration(seconds: float) -> str:
    """4000 -> 1:06:40."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
