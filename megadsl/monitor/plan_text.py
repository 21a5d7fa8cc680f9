"""The plan of a run as a page of Markdown: what `megadsl plan` shows, as far as one reads it beside curves."""

from collections.abc import Sequence

from megadsl.schemes.plan import SignalPlan, SublayerPlan

_ENDS = 6  # sublayers shown from each end of a stack of layers


def plan_text(plan: SignalPlan, title: str) -> str:
    """A table: lambda, beta, sigmas and the predicted signal at the ends and in the middle of the model."""
    lines = [f"**{title}**", "", "| layer | sublayer | lambda | beta | sigma of the weights | variance | correlation | gradient |",
             "|---|---|---|---|---|---|---|---|", _row("", "embedding", "", "", plan.embedding.weight_std, plan.embedding)]
    for sublayer in _shown(plan.sublayers):
        if sublayer is None:
            lines.append("| ... | | | | | | | |")
            continue
        lines.append(_row(f"{sublayer.stack} {sublayer.layer}", sublayer.kind, f"{sublayer.residual_scale:.5g}",
                          f"{sublayer.branch_scale:.5g}", sublayer.weight_std, sublayer))
    lines.append(_row("", "final", "", "", plan.head.weight_std, plan.final))
    return "\n".join([*lines, "", "Every row: `megadsl plan RUN/config.yaml --full`. Gradient variance is in units of that at the head's input."])


def _shown(sublayers: Sequence[SublayerPlan]) -> list[SublayerPlan | None]:
    if len(sublayers) <= 2 * _ENDS + 2:
        return [*sublayers]
    middle = len(sublayers) // 2
    return [*sublayers[:_ENDS], None, *sublayers[middle - 1:middle + 1], None, *sublayers[-_ENDS:]]


def _row(layer: str, name: str, skip: str, branch: str, weight_std: dict[str, float], point) -> str:
    sigmas = ", ".join(f"{role} {std:.4g}" for role, std in weight_std.items())
    signal = f"{point.forward_variance:.4g} | {point.correlation:.4f} | {point.gradient_variance:.4g}"
    return f"| {layer} | {name} | {skip} | {branch} | {sigmas} | {signal} |"
