"""`megadsl plan`: the numbers that a configuration would start from, and the signal that they should give, before anything
runs."""

from pathlib import Path

import typer

from megadsl.cli.arguments import config_from_arguments, writing
from megadsl.errors import UserError
from megadsl.schemes.plan import SignalPlan, StreamPrediction, SublayerPlan
from megadsl.schemes.registry import SCHEMES
from megadsl.tasks.planning import describe_remedies, plan_for_comparison, plan_for_run
from megadsl.tasks.registry import task_of

# A table longer than this is cut in the middle; 1000 layers are 2000 rows.
SHOWN_ROWS = 24


def plan(
    arguments: list[str] = typer.Argument(..., metavar="CONFIG... [key=value...]", help="YAML files, then overrides"),
    as_json: bool = typer.Option(False, "--json", help="print the whole plan as JSON"),
    figure: Path = typer.Option(None, help="write a PNG: forward variance, token correlation, gradient variance"),
    compare: str = typer.Option(
        "", help="schemes beside each other, for example dslm,vanilla,deepnorm; each with the norms that it needs; "
        "all: those that go with the model"),
    full: bool = typer.Option(False, "--full", help="print every row of the table"),
    measure: int = typer.Option(0, min=0, help="build the model with so many seeds and measure it on the data; 0: only predict"),
) -> None:
    """Show lambda, beta, sigmas and the predicted signal of every sublayer."""
    config = config_from_arguments(arguments)
    names = [name.strip() for name in compare.split(",") if name.strip()]
    if names == ["all"]:
        names = [name for name, scheme in SCHEMES.items() if scheme.norm_position in (None, config.model.norm_position)]
    if names:
        plans = {}
        for one in (plan_for_comparison(config, name) for name in dict.fromkeys(names)):
            moved = "" if one.norm_position == config.model.norm_position else f" ({one.norm_position})"
            plans[one.scheme + moved] = one
    else:
        plans = {config.scheme.name: plan_for_run(config)}
    measured = {}
    if measure:
        from megadsl.monitor.at_init import measure_at_init

        measured = {label: measure_at_init(config, one, measure) for label, one in plans.items()}
    if figure is not None:
        _write_figure(plans, figure, measured)
    if as_json:
        texts = [one.to_json(indent=1) for one in plans.values()]
        print(texts[0] if len(texts) == 1 else "[" + ",\n".join(texts) + "]")
        return
    if len(plans) == 1:
        _print_table(*plans.values(), task_of(config).describe_inputs(), full)
    else:
        _print_comparison(plans, task_of(config).describe_inputs(), full)
    for label, one in plans.items():
        for line in describe_remedies(config, one):
            print(f"{label}, {line}")
        if one.role_factors:
            print(_factors(label, one))
        if measured:
            print(_agreement(label, one, measured[label], measure))
    if figure is not None:
        print(f"Figure: {figure}")


def _print_table(plan: SignalPlan, inputs: str, full: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    trained = sorted({sublayer.gate for sublayer in plan.sublayers} - {"fixed"})
    gates = f"; beta is trained (one number a {'sublayer' if trained == ['scalar'] else 'channel'})" if trained else ""
    table = Table(title=f"{plan.scheme}, {plan.family}, {_norms(plan)}{gates}; {inputs}", title_justify="left")
    for column in ("layer", "sublayer", "lambda", "beta", "sigma of the weights", "variance", "correlation", "gradient"):
        table.add_column(column, justify="left" if column in ("sublayer", "sigma of the weights") else "right")
    gain = "" if plan.embedding.norm_gain is None else f"  norm gain {plan.embedding.norm_gain:.4g}"
    table.add_row("", "embedding", "", "", _sigmas(plan.embedding.weight_std) + gain, *_signal(plan.embedding))
    for sublayer in _shown(plan, full):
        if sublayer is None:
            table.add_row("...", f"({len(plan.sublayers) - SHOWN_ROWS} more: --full)")
            continue
        scale = "" if sublayer.norm_scale == 1.0 else f"  norm x {sublayer.norm_scale:.4g}"
        table.add_row(*_place(plan, sublayer), f"{sublayer.residual_scale:.5g}", f"{sublayer.branch_scale:.5g}",
                      _sigmas(sublayer.weight_std) + scale, *_signal(sublayer))
    scale = [] if plan.head.hidden_scale == 1.0 else [f"hidden_scale {plan.head.hidden_scale:.4g}"]
    head = "  ".join(filter(None, [_sigmas(plan.head.weight_std), *scale]))
    table.add_row("", "final", "", "", head, *_signal(plan.final))
    Console(width=None if Console().is_terminal else 140).print(table)


def _print_comparison(plans: dict[str, SignalPlan], inputs: str, full: bool) -> None:
    """One table: a row for each depth, three columns for each scheme."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first = next(iter(plans.values()))
    table = Table(title=f"{first.family}; {inputs}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("\nlayer", justify="right", no_wrap=True)
    table.add_column("\nsublayer", no_wrap=True)
    for label in plans:
        for title in (f"{label}\nvariance", "\ncorr.", "\ngradient"):
            table.add_column(title, justify="right", no_wrap=True)

    def row(place: tuple[str, str], points: list[StreamPrediction]) -> None:
        table.add_row(*place, *(text for point in points for text in _signal(point, 3)))

    row(("", "embedding"), [plan.embedding for plan in plans.values()])
    for sublayers in zip(*(_shown(plan, full) for plan in plans.values()), strict=True):
        if sublayers[0] is None:
            table.add_row("...", f"({len(first.sublayers) - SHOWN_ROWS} more: --full)")
        else:
            row(_place(first, sublayers[0]), sublayers)
    row(("", "final"), [plan.final for plan in plans.values()])
    # Never folded: many schemes need a wide terminal (or less -S).
    wide = Console(width=1000)
    Console(width=max(Console().width, wide.measure(table).maximum), soft_wrap=True).print(table)


def _place(plan: SignalPlan, sublayer: SublayerPlan) -> tuple[str, str]:
    layer = f"{sublayer.stack[:3]} {sublayer.layer}" if len(plan.stacks) > 1 else str(sublayer.layer)
    return layer, sublayer.kind


def _norms(plan: SignalPlan) -> str:
    return {"both": "norms on both sides", "none": "no norms"}.get(plan.norm_position, f"{plan.norm_position}-norm")


def _factors(label: str, plan: SignalPlan) -> str:
    """The optimizer's factors, roles with equal ones together."""
    groups: dict[str, list[str]] = {}
    for role, factors in plan.role_factors.items():
        groups.setdefault(" ".join(f"{name} x {factor:.4g}" for name, factor in factors.items()), []).append(role)
    return f"{label}, optimizer: " + "; ".join(f"{', '.join(roles)}: {text}" for text, roles in groups.items())


def _agreement(label: str, plan: SignalPlan, measured: list[StreamPrediction], num_seeds: int) -> str:
    # Where no gradient is expected (the encoder behind ReZero's closed gates) there is no ratio.
    pairs = list(zip(measured[1:], plan.sublayers, strict=True))
    ratios = {
        name: [getattr(point, name) / getattr(expected, name) for point, expected in pairs if getattr(expected, name)]
        for name in ("forward_variance", "gradient_variance")
    }
    variances = [point.forward_variance for point in measured[1:]]
    return (
        f"{label}, measured at initialisation (mean over {num_seeds} draws): forward variance {min(variances):.4g} to "
        f"{max(variances):.4g}; measured / planned: forward variance {min(ratios['forward_variance']):.3f} to "
        f"{max(ratios['forward_variance']):.3f}, gradient variance {min(ratios['gradient_variance']):.3f} to "
        f"{max(ratios['gradient_variance']):.3f}"
    )


def _shown(plan: SignalPlan, full: bool) -> list:
    if full or len(plan.sublayers) <= SHOWN_ROWS:
        return list(plan.sublayers)
    return [*plan.sublayers[:SHOWN_ROWS // 2], None, *plan.sublayers[-(SHOWN_ROWS // 2):]]


def _sigmas(weight_std: dict[str, float]) -> str:
    """`query .125 key .125`, with equal neighbours joined: `query, key .125`."""
    groups: list[tuple[list[str], float]] = []
    for role, std in weight_std.items():
        if groups and groups[-1][1] == std:
            groups[-1][0].append(role)
        else:
            groups.append(([role], std))
    return "  ".join(f"{', '.join(roles)} {std:.4g}" for roles, std in groups)


def _signal(point: StreamPrediction, digits: int = 4) -> tuple[str, str, str]:
    return f"{point.forward_variance:#.{digits}g}", f"{point.correlation:.{digits}f}", f"{point.gradient_variance:#.{digits}g}"


def _write_figure(plans: dict[str, SignalPlan], path: Path, measured: dict[str, list[StreamPrediction]]) -> None:
    from megadsl.theory.figures import depth_figure

    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--figure {path}: the name must end in .png, .pdf or .svg.")
    with writing(path):
        depth_figure({label: [one.embedding, *one.sublayers] for label, one in plans.items()}, path, measured)
