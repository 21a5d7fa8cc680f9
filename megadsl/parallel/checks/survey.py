"""All checks, by all ranks: each node checks itself once, the ranks check what lies between them, everyone gets one table."""

from pathlib import Path

from megadsl.parallel.checks.communication import check_communication
from megadsl.parallel.checks.file_system import check_file_system
from megadsl.parallel.checks.findings import Finding, Ranks, node_name
from megadsl.parallel.checks.installation import LIBRARIES, check_deepspeed_ops, check_versions
from megadsl.parallel.checks.node import check_devices, check_slurm
from megadsl.parallel.device import gpu_identity, prepare_device
from megadsl.parallel.launch import Launch

Row = tuple[str, Finding]  # the nodes that it holds on ("": all), finding


def survey(launch: Launch, folder: Path) -> list[Row]:
    """The table, equal on all ranks; `folder` is where runs will lie. Call on all ranks together.

    Raises:
        UserError: the folder cannot be written.
    """
    device = prepare_device("auto", launch.local_rank)
    ranks = Ranks(launch, device)
    try:
        of_node = []
        hosts, gpus = ranks.gather(node_name()), ranks.gather(gpu_identity(device))
        if hosts.index(hosts[ranks.rank]) == ranks.rank:
            of_this_node = [gpu for host, gpu in zip(hosts, gpus, strict=True) if host == hosts[ranks.rank]]
            of_node = [*check_versions(), *check_devices(device, of_this_node), *check_slurm(), *check_deepspeed_ops(device)]
        common = check_communication(ranks, launch.launcher) + check_file_system(folder, ranks)
        return merge(list(zip(hosts, ranks.gather(of_node), strict=True)), common)
    finally:
        ranks.close()


def merge(per_rank: list[tuple[str, list[Finding]]], common: list[Finding]) -> list[Row]:
    """One table out of (node, its findings) of every rank and what holds for all: what all nodes share is one row; rows of a topic stay together."""
    where: dict[Finding, list[str]] = {}
    for host, findings in per_rank:
        for finding in findings:
            where.setdefault(finding, []).append(host)
    nodes = {host for host, _ in per_rank}
    topics = list(dict.fromkeys(finding.topic for finding in where))
    rows = sorted(where.items(), key=lambda row: topics.index(row[0].topic))
    merged = [("" if set(hosts) == nodes else ", ".join(hosts), finding) for finding, hosts in rows]
    different = {topic for topic in LIBRARIES if len({finding.text for finding in where if finding.topic == topic}) > 1}
    if different:
        names = ", ".join(sorted(different))
        merged.append(("", Finding("nodes differ", names, f"{names} differ between nodes; give all of them one environment.")))
    return merged + [("", finding) for finding in common]
