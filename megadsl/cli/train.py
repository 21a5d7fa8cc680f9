"""`megadsl train CONFIG [key=value ...]`: train or resume a run, on one process or under any launcher."""

from pathlib import Path

import typer

from megadsl.cli.arguments import config_from_arguments


def train(
    arguments: list[str] = typer.Argument(..., metavar="CONFIG [KEY=VALUE]...", help="YAML files, then overrides."),
) -> None:
    """Train, or resume where the run folder's last checkpoint is."""
    config = config_from_arguments(arguments)
    from megadsl.training.preflight import preflight
    from megadsl.training.signals import Stop

    with Stop() as stop:
        ready = preflight(config)
        # Only now: these imports take seconds, which a mistake in the config should not cost.
        from megadsl.training.loop import train as run_training

        checkpoint = run_training(config, ready, stop)
    if ready.launch.rank == 0:
        run_dir = Path(config.training.run_dir)
        print(
            f"TensorBoard: tensorboard --logdir {run_dir / 'tensorboard'} | checkpoint: {checkpoint} | "
            f"plan: {run_dir / 'plan.json'}"
        )
