"""A run on Weights & Biases, with the names that TensorBoard shows. The package is imported here only, where monitor.wandb asks for it."""

import importlib.util
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megadsl.config.training import MonitorConfig
from megadsl.errors import UserError


def check_wandb(monitor: MonitorConfig) -> None:
    """UserError where monitor.wandb is asked for and the package is missing; costs no import."""
    if monitor.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("monitor.wandb needs the package wandb: pip install 'megadsl[wandb]', or set monitor.wandb=false.")


class WandbRun:
    """Goes on with the run of the same folder where there is one (its id lies in RUN/wandb_id). WANDB_MODE=offline sends nothing.

    Raises:
        UserError: W&B does not let the run start (no login, no network).
    """

    def __init__(self, run_dir: Path, monitor: MonitorConfig):
        check_wandb(monitor)
        import wandb

        self._wandb, identity = wandb, run_dir / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=monitor.wandb_project, entity=monitor.wandb_entity, name=run_dir.resolve().name, dir=str(run_dir),
                id=identity.read_text(encoding="utf-8").strip(), resume="allow",
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"monitor.wandb: Weights & Biases does not start ({str(error).splitlines()[0]}); run `wandb login`, set WANDB_MODE=offline, "
                "or set monitor.wandb=false."
            ) from error
        # W&B's own step only grows; ours is said with each number, so that late pictures and resumed runs find their place.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def text(self, name: str, markdown: str, iteration: int) -> None:
        self._run.log({"iteration": iteration, name: self._wandb.Html(f"<pre>{_escaped(markdown)}</pre>")})

    def picture(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        self._run.log({"iteration": iteration, name: self._wandb.Image(pixels)})

    def histogram(self, name: str, values: Sequence[float], iteration: int) -> None:
        self._run.log({"iteration": iteration, name: self._wandb.Histogram(np.asarray(values))})

    def hyperparameters(self, values: dict[str, str | int | float | bool]) -> None:
        self._run.config.update(values, allow_val_change=True)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        self._run.finish()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
