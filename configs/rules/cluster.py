"""The description of the machines that a run is planned for."""

from collections.abc import Iterator
from operator import attrgetter

from triptych.configs.problems import Problem, either, typed_list
from triptych.configs.schema import Config

NEEDED = {
    "gpus": "1024",
    "gpus_per_node": "8",
    "memory_gib": "79.1",
    "reserved_gib": "5",
    "peak_tflops": "989",
    "intra_node_gb_s": "450",
    "inter_node_gb_s": "50",
    "link_efficiency": "0.8",
    "latency_us": "20",
}
"""What a plan needs of ``cluster`` -> a value that makes sense; those of H100 nodes."""

UNMEASURED = ("efficiency", "link_efficiency", "latency_us", "reserved_gib")
"""Keys of ``cluster`` that stand on no data sheet: assumed unless ``cluster.measured`` names it."""


def check_cluster(config: Config) -> Iterator[Problem]:
    """The cluster is described: how many devices, how fast, how large, and how they are linked."""
    missing = [name for name in NEEDED if attrgetter(name)(config.cluster) is None]
    for name in missing:
        group = ", or cluster=h100 or another group that says it" if name != "gpus" else ""
        yield Problem(
            f"cluster.{name}=null: a plan needs it", f"cluster.{name}={NEEDED[name]}{group}"
        )


def check_measured(config: Config) -> Iterator[Problem]:
    """What is said to be measured is something that else is assumed."""
    unknown = [name for name in config.cluster.measured if name not in UNMEASURED]
    if unknown:
        known = [name for name in config.cluster.measured if name in UNMEASURED]
        yield Problem(
            f"cluster.measured={typed_list(config.cluster.measured)} may name {either(UNMEASURED)}",
            f"cluster.measured={typed_list(known)}",
        )


def check_size(config: Config, world_size: int) -> Iterator[Problem]:
    """A run that is started has as many ranks as it was described to have."""
    gpus = config.cluster.gpus
    if gpus is not None and gpus != world_size:
        yield Problem(
            f"cluster.gpus={gpus} is not the number of ranks that were started, {world_size}",
            f"cluster.gpus={world_size} or cluster.gpus=null",
        )
