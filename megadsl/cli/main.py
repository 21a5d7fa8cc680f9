"""The `megadsl` command: collects the verbs and turns a UserError into one sentence and exit code 2."""

import sys
import warnings

import typer

from megadsl.cli import checkpoint, config, data, diagnose, doctor, evaluate, generate, plan, report, slurm, sweep, theory, tokenizer, train
from megadsl.errors import UserError
from megadsl.parallel.launch import launched_rank
from megadsl.parallel.threads import set_threads

app = typer.Typer(
    help="Train very deep transformers with DeepScaleLM, and predict their signal before you do.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.command("compare")(report.compare)
app.command("diagnose")(diagnose.diagnose)
app.command("doctor")(doctor.doctor)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.command("report")(report.report)
app.command("sweep")(sweep.sweep)
app.command("train")(train.train)
app.add_typer(slurm.app, name="slurm")
app.add_typer(theory.app, name="theory")
app.add_typer(tokenizer.app, name="tokenizer")


@app.callback()
def _for_every_verb(
    threads: int = typer.Option(
        None, "--threads", min=1, help="Compute threads of this process. Default: OMP_NUM_THREADS, else its share of the cores."),
    local_rank: int = typer.Option(None, "--local_rank", hidden=True, help="given by the deepspeed launcher"),
) -> None:
    # The deepspeed launcher puts --local_rank before the verb; rank discovery reads the environment instead.
    set_threads(threads)


def run() -> None:
    """Console entry point."""
    _quieten_dependencies()
    try:
        app()
    except UserError as error:
        if launched_rank() == 0:  # every rank finds the same mistake; one of them says it
            print(f"megadsl: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("megadsl: interrupted", file=sys.stderr)
        sys.exit(130)


def _quieten_dependencies() -> None:
    # What one dependency owes another (deprecations, "Apex is not installed") is nothing that a user of ours can mend.
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch\.jit|torch\.distributed)\b.*")
    # DeepSpeed's pipeline broadcasts activations that carry a graph; their gradient comes back by its own receive.
    warnings.filterwarnings("ignore", message=r"c10d::broadcast_: an autograd kernel was not registered")
