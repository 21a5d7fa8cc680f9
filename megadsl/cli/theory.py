"""`megadsl theory`: moments of a component, the depth profile of a configuration, the check against sampling, the figures."""

import json
from pathlib import Path

import typer

from megadsl.cli.arguments import config_from_arguments, writing
from megadsl.errors import UserError

app = typer.Typer(help="Predict the signal at initialisation, and check the formulas against sampling.", no_args_is_help=True)


@app.command("component")
def component(
    name: str = typer.Argument(..., metavar="NAME",
        help="linear, dropout, relu, gelu, silu, tanh_gelu, squared_relu, swiglu, geglu, "
                               "layernorm, rmsnorm, softmax, attention, cross_attention or ffn"),
    settings: list[str] = typer.Argument(None, metavar="[key=value...]", help="keys: docs/theory.md; each has a default"),
    as_json: bool = typer.Option(False, "--json", help="print one JSON object"),
) -> None:
    """Moments of one component: forward and backward, per coordinate, averaged over positions."""
    from megadsl.theory.contract import component_json

    texts = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"'{setting}' is not of the form key=value.")
        if key in texts:
            raise UserError(f"{key} is given twice.")
        texts[key] = text
    result = component_json(name, texts)
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    for key, value in result.items():
        if isinstance(value, float):
            print(f"{key:32s} {value:.6g}")
    if result["per_position"]:
        print("per_position: arrays " + ", ".join(result["per_position"]) + " (--json)")
    if result["ignored"]:
        print("no influence: " + ", ".join(result["ignored"]))


@app.command("predict")
def predict(
    arguments: list[str] = typer.Argument(..., metavar="CONFIG... [key=value...]", help="YAML files, then overrides"),
    level: str = typer.Option("matrix", help="matrix: every position; scalar: one variance and one correlation a sublayer"),
    as_json: bool = typer.Option(False, "--json", help="print one JSON object"),
    npz: Path = typer.Option(None, help="write the arrays, by sublayer and by position"),
    figure: Path = typer.Option(None, help="write a PNG of the profile"),
) -> None:
    """The depth profile of a configuration: the residual stream after every sublayer."""
    from megadsl.tasks.planning import profile_for_run

    if level not in ("matrix", "scalar"):
        raise UserError(f"--level must be matrix or scalar, not {level}.")
    profile = profile_for_run(config_from_arguments(arguments), level)
    if npz is not None:
        with writing(npz):
            profile.save_npz(npz)
    if figure is not None:
        with writing(figure):
            profile.figure(figure)
    if as_json:
        print(profile.to_json())
        return
    print(f"{'sublayer':>24s} {'variance':>10s} {'correlation':>12s} {'gradient':>10s} {'its corr.':>10s}")
    rows = [("embedding", profile.embedding)]
    rows += [(f"{sublayer.stack} {sublayer.layer} {sublayer.kind}", prediction)
             for sublayer, prediction in zip(profile.sublayers, profile.predictions, strict=True)]
    for label, point in [*rows, ("final", profile.final)]:
        print(f"{label:>24s} {point.forward_variance:10.4g} {point.correlation:12.4f} {point.gradient_variance:10.4g} "
              f"{point.gradient_correlation:10.4f}")


@app.command("check")
def check(
    what: str = typer.Argument("all", help="components, models, all, or unit (the unit variance of causal DSLM)"),
    size: str = typer.Option("small", help="small (a few minutes) or full (about an hour on one core)"),
    seed: int = typer.Option(0, help="seed of the random grids and of the sampler"),
    output: Path = typer.Option(None, help="folder for check.json and figures"),
    as_json: bool = typer.Option(False, "--json", help="print JSON instead of the table"),
) -> None:
    """Sample components and whole models in torch and print how far the formulas are off, with percentiles and standard
    errors."""
    from megadsl.cli.theory_cases import run_check
    from megadsl.theory import check as checking

    if what not in ("components", "models", "all", "unit"):
        raise UserError(f"What to check is components, models, all or unit, not {what}.")
    if size not in ("small", "full"):
        raise UserError(f"--size must be small or full, not {size}.")
    rows = run_check(what, size, seed, checking.progress_note)
    report = {"what": what, "size": size, "seed": seed, "summary": checking.summary(rows), "rows": rows}
    if output is not None:
        with writing(output / "check.json") as path:
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
            checking.figure(rows, output / "check.png")
    print(json.dumps(report) if as_json else checking.table(rows))


@app.command("figures")
def figures(
    output: Path = typer.Argument(Path("docs/figures"), help="folder for theory-*.png"),
    seed: int = typer.Option(0, help="seed of the measurements"),
) -> None:
    """Draw the figures of docs/theory.md (with measurements; some minutes)."""
    from megadsl.cli.theory_cases import draw_figures

    with writing(output / "theory-*.png"):
        for path in draw_figures(output, seed):
            print(path)
