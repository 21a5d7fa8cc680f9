"""The page of `megadsl diagnose`, and what it found in sentences."""

import math
import time

import numpy as np

from megadsl.monitor.diagnosis.result import Diagnosis, Skip
from megadsl.monitor.pages.drawings import TEXT, Curve, bars, heat_map, lines
from megadsl.monitor.pages.page import Drawing, Page
from megadsl.monitor.pages.signal_parts import DEPTH, agreement_table, point_label, profiles, worst_table
from megadsl.schemes.plan import SignalPlan

_LISTED = 8
# Where a finding becomes worth a sentence of warning.
_COLLAPSED, _OUTLIER, _ONE_KEY, _HIGH_LOGIT, _UNUSED, _FAR = 0.95, 20.0, 0.1, 50.0, 0.002, 0.7


def findings(found: Diagnosis) -> list[str]:
    """What there is to know first, a sentence each."""
    values = found.signal.values
    variance, correlation, gradient = (values[name] for name in ("forward_second_moment", "token_correlation", "gradient_variance"))
    stream = variance[:-1][np.isfinite(variance[:-1])]
    layers = int(np.isfinite(values["angular_distance"]).sum())
    lines = [f"loss {found.loss:.4f} on {found.facts['samples']} samples",
             f"second moment of the stream {stream.min():.4g} to {stream.max():.4g}"]
    if np.isfinite(gradient[0]) and gradient[-2] > 0:
        lines.append(f"gradient variance: first point {gradient[0] / gradient[-2]:.3g} times the last")
    last = float(correlation[-2])
    lines.append(f"token correlation at the top {last:.3f}" + (": all positions look alike (rank collapse)" if last > _COLLAPSED else ""))
    lines.append(f"effective depth {found.effective_depth:.1f} of {layers} layers (by the angles that they turn the stream)")
    if single := [skip for skip in found.skips if skip.count == 1]:
        idle = [skip for skip in single if skip.loss_increase < _UNUSED * found.loss]
        lines.append(f"of {len(single)} layers left out alone, {len(idle)} cost less than {_UNUSED:.1%} of the loss")
    logits = values["attention_logit_max"]
    if np.isfinite(logits).any():
        top = int(np.nanargmax(logits))
        lines.append(f"largest attention logit {logits[top]:.1f} ({point_label(found.points[top])})"
                     + (": high; QK-norm holds it down (model.qk_layernorm)" if logits[top] > _HIGH_LOGIT else ""))
    narrow = sum(entropy < _ONE_KEY for heads in found.heads.get("entropy", {}).values() for entropy in heads)
    if narrow:
        lines.append(f"{narrow} heads look at hardly more than one key (entropy below {_ONE_KEY} of the largest possible)")
    if found.outliers:
        first = found.outliers[0]
        lines.append(f"largest coordinate {first.ratio:.1f} times the root mean square (coordinate {first.coordinate} at {first.point})"
                     + (": an outlier feature" if first.ratio > _OUTLIER else ""))
    if found.fits:
        best = found.fits[0]
        lines.append(f"nearest plan: {best.name} (second moment and gradient variance off by a factor of {math.exp(best.error):.3g}, root mean "
                     "square over depth)" + ("; no plan is near, as after much training" if best.error > _FAR else ""))
    return lines


def diagnosis_page(found: Diagnosis, name: str, plan: SignalPlan | None) -> Page:
    """The page; `plan` is that of the run that made the model, None where there was none."""
    page = Page(f"Diagnosis of {name}", "What the model does with its signal, measured on one process without dropout")
    page.facts(found.facts | {"task": str(found.facts["task"]).replace("_", " ")})
    page.section("Found")
    page.points(findings(found))
    _depth(page, found, plan)
    _layers(page, found)
    _attention(page, found)
    _outliers(page, found)
    _fits(page, found)
    page.foot("megadsl diagnose, " + time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    return page


def _depth(page: Page, found: Diagnosis, plan: SignalPlan | None) -> None:
    page.section("Moments by depth")
    record = {"measured": found.signal}
    if plan is None:
        page.note("A Hugging Face folder has no plan; the last section names the nearest one.")
    else:
        page.text("The plan says what the model was at its start; training leads away from it.")
    page.figures(profiles(plan, record))
    if plan is not None:
        agreement_table(page, plan, record)
        worst_table(page, plan, found.signal, "The points farthest from the plan.")


def _layers(page: Page, found: Diagnosis) -> None:
    page.section("What layers are worth")
    if not found.skips:
        page.note("No layer was left out (--skips 0).")
        return
    page.text("The loss with a layer or a window of layers left out, minus the loss with all of them. A layer that is left out hands on what "
              "came in (in a Pre-LN model: with its branches switched off).")
    drawings = []
    for stack in dict.fromkeys(skip.stack for skip in found.skips):
        for single, what in ((True, "single layers"), (False, "windows")):
            skips = [skip for skip in found.skips if skip.stack == stack and (skip.count == 1) == single]
            if skips:
                size = skips[0].count
                title = f"{stack}, {what}" + ("" if single else f" of {size} layers")
                gap = min((b.first - a.first for a, b in zip(skips, skips[1:], strict=False)), default=1)
                drawings.append(bars(title, [skip.first for skip in skips], [skip.loss_increase for skip in skips],
                                     "layer" if single else "first layer of the window", "increase of the loss", width=0.8 * gap))
    page.figures(drawings)
    ordered = sorted(found.skips, key=lambda skip: skip.loss_increase)
    page.table(["left out", "increase of the loss"], [[_skipped(skip), skip.loss_increase] for skip in ordered[-1:-_LISTED - 1:-1]], "Worth most.")
    page.table(["left out", "increase of the loss"], [[_skipped(skip), skip.loss_increase] for skip in ordered[:_LISTED]], "Worth least.")


def _skipped(skip: Skip) -> str:
    return f"{skip.stack} layer {skip.first}" if skip.count == 1 else f"{skip.stack} layers {skip.first} to {skip.first + skip.count - 1}"


def _attention(page: Page, found: Diagnosis) -> None:
    page.section("Attention by head")
    entropy = found.heads.get("entropy", {})
    if not entropy:
        page.note("The model has no attention that was looked at.")
        return
    drawings = []
    for kind in ("self_attention", "cross_attention"):
        for stack in ("encoder", "decoder"):
            names = [name for name in entropy if name.startswith(f"{stack}.") and name.endswith(kind)]
            for key, log in (("entropy", False), ("logit_max", False), ("logit_variance", True)):
                if names:
                    table = np.array([found.heads[key][name] for name in names]).T
                    drawings.append(heat_map(f"{stack} {kind.replace('_', ' ')}, {_HEADS[key]}", table, "layer", "head", log))
    page.figures(drawings)
    rows = [[name, head, value, found.heads["logit_max"][name][head], found.heads["logit_variance"][name][head]]
            for name, heads in entropy.items() for head, value in enumerate(heads)]
    rows.sort(key=lambda row: row[2])
    page.table(["addition", "head", "entropy", "largest logit", "logit variance"], rows[:_LISTED], "The heads with the lowest entropy.")


_HEADS = {
    "entropy": "entropy over the log of the keys seen (1: uniform, 0: one key)", "logit_max": "largest logit",
    "logit_variance": "variance of the logits over keys",
}


def _outliers(page: Page, found: Diagnosis) -> None:
    page.section("Outlier features")
    ratio = np.array(found.outlier_ratio)
    page.text("The largest |activation| of any coordinate over the root mean square of the stream, at every point. Coordinates far above the "
              "others cost accuracy where activations are stored in few bits.")
    drawings: list[Drawing] = [lines("largest coordinate over the root mean square", {"ratio": Curve(np.arange(len(ratio)), ratio)}, DEPTH, "ratio")]
    page.figures(drawings)
    page.table(["coordinate", "ratio", "where it is largest"], [[one.coordinate, one.ratio, one.point] for one in found.outliers])


def _fits(page: Page, found: Diagnosis) -> None:
    page.section("Nearest plan")
    page.text("The measured profile against the plan of every scheme that goes with the model: root mean square of ln(measured / plan) over "
              "depth, so 0.1 is about 10 %. Folded: the plan as a plain transformer has it, with its scalars in the weights. Shape: with the "
              "best common factor taken out. Behind a norm the second moment is the norm's own, so there the gradient decides.")
    drawings = []
    for quantity, expected in found.nearest.items():
        measured, label = found.signal.values[quantity][:-1], quantity.replace("_", " ")
        depth = np.arange(len(expected))
        curves = {f"plan {found.fits[0].name}": Curve(depth, expected, "dashes", TEXT), "measured": Curve(depth, measured)}
        drawings.append(lines(f"{label}, measured and nearest plan", curves, DEPTH, label))
    page.figures(drawings)
    page.table(["plan", "both", "second moment", "its shape", "gradient variance"],
               [[fit.name, fit.error, fit.forward_error, fit.shape_error, fit.gradient_error] for fit in found.fits])
