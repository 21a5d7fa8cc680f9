"""What a rank does at a start and at a resume against the number of ranks: numbers drawn, bytes read, seconds; and before/after.

"Before" is what every rank did until 2026-11-24: it drew every full tensor on one thread and read every full weight (and at ZeRO 0
every full moment). That is run here too (with today's generator), beside what is done now, so that the figures are ratios of one
run; the checkpoint lies in the page cache, and ranks share the machine's cores. Bytes are those of the tensors that were asked for.

    python benchmarks/start_and_resume.py [--layers 48] [--hidden 512] [--ranks 1 2 4] [--threads 1]
"""

import argparse
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

VOCAB_SIZE = 512
COLUMNS = (
    "layout", "drawn, M numbers", "before", "draw, s", "before", "read, MB a rank", "before", "read, MB in all", "before", "resume, s",
    "before",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # zero stage and tensor size of a process that this program started
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace, ranks: int, worker: str, folder: str) -> None:
    """This program again as `ranks` processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [
        sys.executable, __file__, "--worker", worker, "--folder", folder, "--layers", str(options.layers), "--hidden", str(options.hidden),
        "--threads", str(options.threads),
    ]
    processes = [
        subprocess.Popen(command, env={
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": str(options.threads),
        }, stderr=subprocess.DEVNULL if rank else None) for rank in range(ranks)
    ]
    if any([process.wait() for process in processes]):
        sys.exit("a rank failed")


def work(options: argparse.Namespace) -> None:
    """One rank: draw, load, and both as it was done before; rank 0 prints the row."""
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    from megadsl.checkpoint.manifest import read_manifest
    from megadsl.checkpoint.weights import TensorReader
    from megadsl.model.init import initialize, leave_to_checkpoint

    torch.set_num_threads(options.threads)
    zero, tensor = map(int, options.worker.split(","))
    make_engine, model, coordinate = prepared(options, zero, tensor)
    parameters = list(model.canonical_parameters())
    drawn = sum(parameter.numel() for _, parameter in parameters if parameter.megadsl_tag.std)
    full = sum(torch.Size(parameter.megadsl_tag.full_shape).numel() for _, parameter in parameters)
    leave_to_checkpoint(parameters)  # memory that was never touched costs more
    draw_seconds = timed(lambda: initialize(parameters, 1, coordinate.tensor, tensor))
    draw_before = timed(lambda: draw_all(parameters, coordinate.tensor, tensor))
    folder, before = Path(options.folder), 4 * full + 8 * full // (dist.get_world_size() if zero else 1)
    if not (folder / "manifest.json").exists():
        save(make_engine(), folder)
        return
    with TensorReader(folder, read_manifest(folder)) as reader:
        read_before = timed(lambda: read_all(parameters, reader, coordinate.tensor, tensor))
    del model, parameters  # four ranks on one machine
    engine = make_engine()
    with TensorReader(folder, read_manifest(folder)) as reader:
        load_seconds = timed(lambda: engine.state.load(reader, 1, {}))
        read = reader.bytes_read
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (drawn, draw_seconds, draw_before, read, before, load_seconds, read_before))
    if dist.get_rank() == 0:
        drawn, draw_seconds, draw_before, read, before, load_seconds, read_before = (max(values) for values in zip(*every, strict=True))
        total, total_before = (sum(row[column] for row in every) for column in (3, 4))
        print(
            f"| {len(every)} rank(s): tensor {tensor}, ZeRO {zero} | {drawn / 1e6:.1f} | {full / 1e6:.1f} | "
            f"{draw_seconds:.2f} | {draw_before:.2f} | {read / 1e6:,.0f} | {before / 1e6:,.0f} | {total / 1e6:,.0f} | "
            f"{total_before / 1e6:,.0f} | {load_seconds:.2f} | {read_before:.2f} (weights alone) |", flush=True,
        )
    dist.barrier()


def prepared(options: argparse.Namespace, zero: int, tensor: int):
    """(what makes the engine, a model that is not initialised, this rank's coordinate)."""
    from megadsl.config.load import parse_config
    from megadsl.model.stack import SequentialModel
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import initialize_groups
    from megadsl.parallel.launch import discover_launch
    from megadsl.parallel.topology import Topology
    from megadsl.tasks.language.causal import CausalLanguageModeling
    from megadsl.tasks.planning import plan_for_run
    from megadsl.training.engine import Engine

    class WithoutTokenizer(CausalLanguageModeling):
        padded_output_size = VOCAB_SIZE

    launch = discover_launch()
    config = parse_config({
        "model": {"num_layers": options.layers, "hidden_size": options.hidden, "num_attention_heads": options.hidden // 32},
        "parallel": {"zero_stage": zero, "tensor_model_parallel_size": tensor},
        "training": {"micro_batch_size": 1, "global_batch_size": launch.world_size},
    })
    topology = Topology(tensor, 1, launch.world_size // tensor)
    device, coordinate = prepare_device("cpu"), topology.coordinate(launch.rank)
    initialize_groups(launch, topology, device)
    task, plan = WithoutTokenizer(config), plan_for_run(config)
    model = SequentialModel(task.define_model(plan).entries)
    names = {name for name, _ in model.canonical_parameters()}  # all of them come from the checkpoint

    def make_engine():
        with contextlib.redirect_stdout(io.StringIO()):
            return Engine(config, task, plan, topology, coordinate, device, filled=names)

    return make_engine, model, coordinate


def draw_all(parameters, rank: int, size: int) -> None:
    """As it was: the full tensor, of which the shard is kept."""
    for name, parameter in parameters:
        parameter.data.copy_(parameter.megadsl_tag.shard(parameter.megadsl_tag.draw(1, name), rank, size))


def read_all(parameters, reader, rank: int, size: int) -> None:
    """As it was, for the weights: every full tensor, of which the shard is kept."""
    for name, parameter in parameters:
        parameter.data.copy_(parameter.megadsl_tag.shard(reader.tensor("weights", name).clone(), rank, size))


def save(engine, folder: Path) -> None:
    """A checkpoint's tensors (of one process)."""
    from megadsl.checkpoint.manifest import CheckpointInfo, Manifest, write_manifest
    from megadsl.checkpoint.weights import write_tensors

    records, error = write_tensors(folder, "rank-00000", engine.state.tensors())
    if error:
        raise error
    write_manifest(folder, Manifest(CheckpointInfo(1, 1, 0, None, 1, 1, 1, 1, VOCAB_SIZE, "", {}), records))


def timed(do) -> float:
    """Seconds, from where all ranks begin."""
    import torch.distributed as dist

    dist.barrier()
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun


def arithmetic(parameters: float = 10e9, ranks: int = 512, tensor: int = 8) -> str:
    """The same counts for a model that no one machine holds."""
    shard, weights = parameters / tensor, 4 * parameters
    return (
        f"{parameters / 1e9:.0f} B parameters, {ranks} ranks (tensor {tensor} x data {ranks // tensor}, ZeRO 1): a rank draws "
        f"{shard / 1e9:.2f} B numbers (before: {parameters / 1e9:.0f} B), at 4 ns a number and with 8 threads {shard * 4e-9 / 8:.1f} s "
        f"(before, one thread: {parameters * 4e-9:.0f} s). On resume a rank reads {3 * weights / ranks / 1e9:.2f} GB (before: "
        f"{(weights + 2 * weights / ranks) / 1e9:.1f} GB), all of them together {3 * weights / 1e12:.2f} TB (before: "
        f"{(weights * ranks + 2 * weights) / 1e12:.1f} TB). From a file system of 100 GB/s that is {3 * weights / 1e11:.1f} s (before: "
        f"{(weights * ranks + 2 * weights) / 1e11:.0f} s)."
    )


def main() -> None:
    options = arguments()
    if options.worker:
        work(options)
        return
    print(f"{options.layers} layers x {options.hidden}, {options.threads} thread(s) a rank, {os.cpu_count()} cores\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run(options, 1, "1,1", folder)  # makes the checkpoint
        for ranks in options.ranks:
            for zero, tensor in dict.fromkeys([(1, 1), (0, 1), (1, ranks)]) if ranks > 1 else [(1, 1)]:
                run(options, ranks, f"{zero},{tensor}", folder)
    print(f"\n{arithmetic()}")


if __name__ == "__main__":
    main()
