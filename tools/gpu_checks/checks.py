"""The checks of tools/gpu_check.py: each gives rows out of what megadsl's commands did on the device, held against something.

Thresholds: fp32 differs between a CPU and a GPU by the order of additions, about 1e-6 a step, and Adam amplifies it where a
gradient is near 0; bf16 rounds to 8 bits. Both are far below what a wrong kernel, mask or generator would do.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from gpu_checks.machine import ROOT, Failed, Machine, Row

from megadsl.monitor.device_peak import peak_tflops

FAMILIES = {
    "decoder": {"task": {"reset_attention_mask": True}},  # packed documents: flex_attention in 16 bits, a dense mask in fp32
    "encoder": {"model": {"family": "encoder", "norm_position": "post", "num_tokentypes": 2, "embedding_layernorm": True},
                "task": {"sentence_order": True}},
    "encoder_decoder": {"model": {"family": "encoder_decoder", "position_embedding_type": "relative"}},
}
FALLS_AFTER = 20  # steps


def family(name: str, machine: Machine) -> Iterator[Row]:
    """Curves on CPU and device, in fp32 and bf16, and the bf16 checkpoint evaluated, sampled and exported."""
    sections = FAMILIES[name]
    shape, task = sections.get("model", {}), sections.get("task", {})
    names = {kind: f"{name}-{kind}" for kind in ("cpu", "fp32", "bf16")}
    on_cpu = machine.config(names["cpu"], model=dict(shape), task=dict(task), training={"device": "cpu"})
    trained = [machine.config(names[kind], model=dict(shape), task=dict(task), training={"precision": kind}) for kind in ("fp32", "bf16")]
    run = str(machine.folder / "runs" / names["bf16"])
    tokens = str(40 * machine.size.seq_length)
    evaluate = ["evaluate", run, "--data", str(machine.folder / "dataset"), "--max-tokens", tokens, "--json"]
    device = ["--device", machine.device]
    commands = [*trained, [*evaluate, *device]]
    if name != "encoder":
        commands.append(["generate", run, "--prompt", "def <extra_id_0>" if name == "encoder_decoder" else "def ", "--max-new-tokens", "8",
                         "--greedy", *device])
    exported = [["checkpoint", "export", run, str(machine.folder / "exports" / name)]] if name in machine.size.exported else []
    afterwards = [[*evaluate, "--device", "cpu"], *exported]
    (machine.folder / "exports").mkdir(exist_ok=True)
    if machine.device == "cpu":  # one process does it all
        printed = machine.session(name, [on_cpu, *commands, *afterwards]).results()
        there, then = printed[1:1 + len(commands)], printed[1 + len(commands):]
    else:
        reference, session = machine.session(f"{name}-cpu", [on_cpu]), machine.session(name, commands)
        there = session.results()
        reference.results()
        then = machine.session(f"{name}-then", afterwards).results()
    yield from curves(machine, names)
    yield evaluated(json.loads(there[2]), json.loads(then[0]))
    if name != "encoder":
        yield Row("", "generate, bf16", repr(there[3].strip()[:40]), "it runs", True)
    if exported:
        error = float(re.search(r"difference of logits ([0-9.e-]+)", then[1])[1])
        yield Row("", "export: logits of transformers", f"relative error {error:.1e}", "<= 1e-4", error <= 1e-4)


def curves(machine: Machine, names: dict[str, str]) -> Iterator[Row]:
    reference, fp32, bf16 = (machine.curve(names[kind]) for kind in ("cpu", "fp32", "bf16"))
    norm = relative(machine.curve(names["fp32"], "train/grad_norm")[:1], machine.curve(names["cpu"], "train/grad_norm")[:1])
    # So few steps as the small form has say nothing of learning.
    falls = ", falls" if machine.size.steps >= FALLS_AFTER else ""

    def fell(losses: list[float]) -> bool:
        return machine.size.steps < FALLS_AFTER or losses[-1] < losses[0] - 0.1

    first, whole, rounded = relative(fp32[:1], reference[:1]), relative(fp32, reference), relative(bf16, fp32)
    yield Row("", "first step, fp32 against CPU", f"loss {first:.1e}, gradient norm {norm:.1e} apart", "<= 1e-5, 1e-4",
              first <= 1e-5 and norm <= 1e-4)
    yield Row("", f"{len(fp32)} steps, fp32 against CPU", f"{whole:.1e} apart; {fp32[0]:.3f} to {fp32[-1]:.3f}", f"<= 5e-3{falls}",
              len(fp32) == machine.size.steps and whole <= 5e-3 and fell(fp32))
    yield Row("", f"{len(bf16)} steps, bf16 against fp32", f"{rounded:.1e} apart; {bf16[0]:.3f} to {bf16[-1]:.3f}", f"<= 3e-2{falls}",
              rounded <= 3e-2 and fell(bf16))


def evaluated(there: dict, here: dict) -> Row:
    """The same bf16 checkpoint evaluated on the device and on the CPU; every loss among the figures is compared."""
    losses = {key: value for key, value in there.items() if "loss" in key and isinstance(value, float)}
    if not losses:
        raise Failed(f"evaluate printed no loss, only {', '.join(there)}")
    apart = max(relative([value], [here[key]]) for key, value in losses.items())
    text = ", ".join(f"{key} {value:.4f}" for key, value in losses.items())
    return Row("", "evaluate, bf16 against CPU", f"{text}; {apart:.1e} apart", "<= 1e-2", apart <= 1e-2)


def relative(values: list[float], expected: list[float]) -> float:
    """The largest relative difference; infinite where one is longer."""
    if len(values) != len(expected):
        return math.inf
    return max(abs(value - other) / max(abs(other), 1e-12) for value, other in zip(values, expected, strict=True))


def moments(machine: Machine) -> Iterator[Row]:
    """Forward and gradient variance at initialisation, mean over draws, in bf16 against the plan."""
    names = [f"{key}={value}" for key, value in (
        ("tokenizer.model", machine.folder / "tokenizer.model"), ("data.datasets", f"[{machine.folder / 'dataset'}]"),
        ("training.device", machine.device), ("training.precision", "bf16"),
    )]
    jobs = [["plan", str(ROOT / "configs" / f"{config}.yaml"), *names, *changes, "--measure", str(machine.size.seeds)]
            for config, changes in machine.size.deep.items()]
    number = r"([0-9.e+-]+)"
    for config, printed in zip(machine.size.deep, machine.session("moments", jobs).results(), strict=True):
        found = re.search(rf"measured / planned: forward variance {number} to {number}, gradient variance {number} to {number}",
                          " ".join(printed.split()))
        if found is None:
            raise Failed("megadsl plan --measure printed no agreement")
        low, high, gradient_low, gradient_high = map(float, found.groups())
        yield Row("", f"{config} at initialisation, bf16", f"measured / planned: forward {low} to {high}, gradient {gradient_low} to "
                  f"{gradient_high}", "0.75 to 1.3, 0.6 to 1.6", 0.75 <= low <= high <= 1.3 and 0.6 <= gradient_low <= gradient_high <= 1.6)


def resume(machine: Machine) -> Iterator[Row]:
    """A run in two processes against one in one, with dropout: equal to the last bit of losses, norms, weights and moments."""
    half, whole = machine.size.steps // 2, machine.size.steps

    def run(name: str, precision: str, steps: int) -> list[str]:
        return machine.config(
            name, model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
            training={"precision": precision, "train_iters": steps, "deterministic": True},
        )

    precisions = ("fp32", "bf16")
    machine.session("resume-first", [run(f"straight-{one}", one, whole) for one in precisions]
                    + [run(f"halves-{one}", one, half) for one in precisions]).results()
    machine.session("resume-second", [run(f"halves-{one}", one, whole) for one in precisions]).results()
    for one in precisions:
        runs = [f"{kind}-{one}" for kind in ("straight", "halves")]
        equal = all(machine.curve(runs[0], key) == machine.curve(runs[1], key) for key in ("train/loss", "train/grad_norm"))
        state = len({tensors_digest(machine.folder / "runs" / run / "checkpoints" / f"iteration-{whole:07d}") for run in runs}) == 1
        yield Row("", f"{half} + {whole - half} steps are {whole}, {one}", f"curves {'equal' if equal else 'differ'}, weights and moments "
                  f"{'equal' if state else 'differ'}", "equal bits", equal and state)


def tensors_digest(checkpoint: Path) -> str:
    digest, files = hashlib.sha256(), sorted(checkpoint.rglob("*.safetensors"))
    if not files:
        raise Failed(f"{checkpoint} holds no tensors")
    for file in files:
        digest.update(file.relative_to(checkpoint).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def one_visible_gpu(machine: Machine) -> Iterator[Row]:
    """A task that sees one GPU under local rank 1, as srun --gpus-per-task=1 starts it."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    if machine.device == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = "0"
    run = machine.config("local-rank", training={"train_iters": 2})
    machine.session("local-rank", [run], variables).results()
    losses = machine.curve("local-rank")
    yield Row("", "LOCAL_RANK=1 with one visible GPU", f"{len(losses)} steps", "2 steps", len(losses) == 2)


def layouts(machine: Machine) -> Iterator[Row]:
    """Two devices against one: tensor, pipeline and data parallel, fp32."""
    if machine.count < 2:
        yield Row("", "layouts of two devices", "not run", "needs 2 GPUs")
        return
    machine.session("layout-1", [machine.config("layout-1", model={"untie_embeddings_and_output_weights": True})]).results()
    expected = machine.curve("layout-1")
    for name, parallel in {
        "tensor": {"tensor_model_parallel_size": 2}, "pipeline": {"pipeline_model_parallel_size": 2}, "zero3": {"zero_stage": 3},
    }.items():
        run = machine.config(f"layout-{name}", model={"untie_embeddings_and_output_weights": True}, parallel=parallel)
        machine.torchrun(f"layout-{name}", run)
        apart = relative(machine.curve(f"layout-{name}"), expected)
        yield Row("", f"{name} on 2 devices against 1", f"{apart:.1e} apart", "<= 5e-3", apart <= 5e-3)


def attention(machine: Machine) -> Iterator[Row]:
    """Packed documents: flex_attention gives what the dense mask gives, and no layer keeps a mask of its own."""
    settings = machine.size.attention
    found = json.loads(machine.session("attention", [["attention", machine.device, json.dumps(settings)]]).results()[0])
    differences = [found[name] for name in ("outputs_apart", "gradients_apart") if name in found]
    yield Row("", "packed documents: flex_attention against a dense mask", ", ".join(f"{one:.1e}" for one in differences) +
              f" apart (without a mask {found['masked_apart']:.1e})", "<= 1e-2", max(differences) <= 1e-2 < found["masked_apart"])
    if machine.device != "cuda":
        yield Row("", "memory of masks", "not run", "needs a GPU")
        return
    one_mask = settings["batch"] * settings["seq_length"] ** 2 * 2
    extra = (found["bytes_dense"] - found["bytes_none"]) / one_mask
    gib = ", ".join(f"{kind} {found[f'bytes_{kind}'] / 2**30:.2f} GiB {1e3 * found[f'seconds_{kind}']:.0f} ms"
                    for kind in ("none", "dense", "blockwise"))
    yield Row("", f"{settings['layers']} layers x {settings['seq_length']} tokens: memory of masks",
              f"{gib}; dense keeps {extra:.1f} masks more", f"< {settings['layers'] // 2} masks", extra < settings["layers"] // 2)


def speed(machine: Machine) -> Iterator[Row]:
    """Step time of dslm over vanilla and over stock Megatron-core, tokens/s and MFU, one device."""
    for settings in machine.size.speed:
        shape = f"{settings['layers']} x {settings['hidden']}"
        printed = machine.session(f"speed-{shape.replace(' ', '')}", [["speed", machine.device, json.dumps(settings)]]).results()[0]
        found = json.loads(printed)
        timed = machine.device == "cuda"  # on a shared CPU and three steps a ratio means nothing
        for name, words, limit in (("dslm_over_vanilla", "step time dslm / vanilla", 1.05),
                                   ("vanilla_over_stock", "step time vanilla / stock Megatron-core", 1.1)):
            yield Row("", f"{shape}: {words}", f"{found[name]:.3f}", f"<= {limit}", found[name] <= limit if timed else None)
        rates = f"{found['tokens_per_second']:,.0f} tokens/s, {found['tflops']:.3g} TFLOP/s{mfu(machine, found['tflops'])}"
        share = f"{100 * found['share_of_gemm']:.0f} % of a matrix product's {found['gemm_tflops']:.3g}"
        yield Row("", f"{shape}: model alone, {settings['precision']}", f"{rates}, {share}")


def throughput(machine: Machine) -> Iterator[Row]:
    """What `megadsl train` achieves with DeepSpeed, data loading and logging."""
    shape = machine.size.throughput
    if shape is None:
        yield Row("", "megadsl train, tokens/s", "not run", "needs a GPU")
        return
    run = machine.config("throughput", model=dict(shape), data={"num_workers": 2}, monitor={"log_interval": 5}, training={
        "precision": "bf16", "train_iters": 20, "micro_batch_size": 8, "global_batch_size": 8})
    machine.session("throughput", [run]).results()
    tokens, tflops, memory = (machine.curve("throughput", key)[-1]
                              for key in ("throughput/tokens_per_second", "throughput/tflops", "memory/peak_gib"))
    yield Row("", f"megadsl train {shape['num_layers']} x {shape['hidden_size']}, bf16, ZeRO 1", f"{tokens:,.0f} tokens/s, {tflops:.3g} "
              f"TFLOP/s{mfu(machine, tflops)}, peak memory {memory:.1f} GiB")


def mfu(machine: Machine, tflops: float) -> str:
    peak = peak_tflops(machine.name, "bf16")
    return "" if peak is None else f", MFU {100 * tflops / peak:.1f} % of {peak:.0f}"


CHECKS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    **{name: partial(family, name) for name in FAMILIES}, "moments": moments, "resume": resume, "local-rank": one_visible_gpu,
    "attention": attention,
    "layouts": layouts, "speed": speed, "throughput": throughput,
}
TIMED = ("attention", "speed", "throughput")  # these run alone
