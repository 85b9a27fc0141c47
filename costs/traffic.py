"""Bytes between ranks, and the seconds in which nothing is computed meanwhile.

Collectives are counted as rings: of n ranks, an all-gather or reduce-scatter of B bytes sends
(n - 1) / n * B from each rank, an all-reduce twice that. Which of them wait and which run beside a
matrix product is how megatron-core 0.16.1 does it (tensor_parallel/layers.py): the backward pass of
a column-parallel layer that trains hides its communication, everything else waits. With
``parallel.overlap.tp_comm`` all layers hide theirs (models/linear.py), and only latency is left.
"""

from dataclasses import dataclass, replace

from triptych.configs.schema import ClusterConfig, Config, Recompute, Zero
from triptych.costs.dtypes import activation_bytes
from triptych.costs.flops import Workload, patch_dim
from triptych.costs.work import PartWork, Work, part_work


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends."""

    sent: float = 0.0
    """Bytes."""
    awaited: float = 0.0
    """Of them, bytes that nothing is computed beside."""
    awaited_messages: int = 0
    """Collectives or messages that carry them."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.sent + other.sent,
            self.awaited + other.awaited,
            self.awaited_messages + other.awaited_messages,
        )

    def __mul__(self, count: int) -> "Traffic":
        return Traffic(self.sent * count, self.awaited * count, self.awaited_messages * count)


@dataclass(frozen=True, slots=True)
class Link:
    """How fast a group of ranks exchanges data."""

    bytes_per_s: float
    latency_s: float

    def seconds(self, traffic: Traffic) -> float:
        """Of what is waited for."""
        return traffic.awaited / self.bytes_per_s + traffic.awaited_messages * self.latency_s


@dataclass(frozen=True, slots=True)
class Links:
    """The links of each axis. Ranks are ordered tp (fastest), dp, pp."""

    tp: Link
    pp: Link
    dp: Link

    @classmethod
    def of(cls, cluster: ClusterConfig, *, tp: int, pp: int, dp: int) -> "Links":
        """By which axes stay within a node; the cluster must be described.

        A dp ring that spans nodes leaves a node through the ports of all its ranks there.
        """
        per_node = cluster.gpus_per_node
        intra, inter = cluster.intra_node_gb_s, cluster.inter_node_gb_s
        assert per_node is not None
        assert intra is not None
        assert inter is not None
        dp_in_node = max(1, per_node // tp)
        replicas = intra if dp <= dp_in_node else min(intra, inter * dp_in_node)
        tensor = tensor_link(cluster, tp)
        pipeline = _link(cluster, intra if tp * pp * dp <= per_node else inter)
        data = _link(cluster, replicas)
        assert tensor is not None
        assert pipeline is not None
        assert data is not None
        return cls(tensor, pipeline, data)


@dataclass(frozen=True, slots=True)
class PassTraffic:
    """Over the tp ranks, for one microbatch."""

    forward: Traffic = Traffic()
    backward: Traffic = Traffic()

    def __add__(self, other: "PassTraffic") -> "PassTraffic":
        return PassTraffic(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: int) -> "PassTraffic":
        return PassTraffic(self.forward * count, self.backward * count)

    def beside_products(self) -> "PassTraffic":
        """The same bytes, all hidden; the latency of each message is still waited for."""
        return PassTraffic(replace(self.forward, awaited=0.0), replace(self.backward, awaited=0.0))


@dataclass(frozen=True, slots=True)
class TensorTraffic:
    """What tensor and sequence parallelism send, by the parts that a split tells apart."""

    vision: PassTraffic
    """Pixels, ViT, embedding."""
    layer: PassTraffic
    """One decoder layer."""
    head: PassTraffic

    def of_chunks(self, layers: tuple[int, ...]) -> list[PassTraffic]:
        """Of each model chunk."""
        chunks = [self.layer * count for count in layers]
        chunks[0] += self.vision
        chunks[-1] += self.head
        return chunks


def tensor_traffic(config: Config, load: Workload) -> TensorTraffic:
    """Per microbatch, on one rank."""
    tp = config.parallel.tp
    if tp == 1:
        return TensorTraffic(PassTraffic(), PassTraffic(), PassTraffic())
    unit = (tp - 1) / tp * activation_bytes(config)
    llm, vision = config.model.language, config.model.vision
    tokens = load.num_tokens * llm.hidden_size * unit
    patches = load.num_patches * vision.hidden_size * unit
    sharded, trains = config.parallel.sequence_parallel, config.stage.llm.train
    embedding = PassTraffic(
        forward=_waits(2 * tokens) + _waits(load.num_patches * patch_dim(vision)),
        backward=_waits(tokens) if sharded else Traffic(),
    )
    if sharded:  # what leaves the ViT, gathered for the merger
        embedding += PassTraffic(forward=_waits(patches))
    vit, layer = _vit(config, patches) * vision.depth, _layer(config, tokens)
    if config.parallel.overlap.tp_comm:
        vit, layer = vit.beside_products(), layer.beside_products()
    return TensorTraffic(
        vision=embedding + vit,
        layer=layer,
        head=PassTraffic(
            forward=(_waits(tokens) if sharded else Traffic()) + _waits(0, messages=3),
            backward=_column_backward(tokens, sharded=sharded, trains=trains),
        ),
    )


def part_duration(config: Config, load: Workload) -> PartWork:
    """How long each part of the model takes, in FLOPs at peak rate, as ``part_work`` counts.

    Where the cluster is described, waiting for the other tp ranks is included.
    """
    parts, cluster = part_work(config, load), config.cluster
    link = tensor_link(cluster, config.parallel.tp)
    if link is None or cluster.peak_tflops is None:
        return parts
    rate, traffic = cluster.peak_tflops * 1e12, tensor_traffic(config, load)

    def with_waiting(work: Work, sent: PassTraffic) -> Work:
        forward, backward = link.seconds(sent.forward), link.seconds(sent.backward)
        return work + Work(forward * rate, backward * rate)

    return PartWork(
        vision=with_waiting(parts.vision, traffic.vision),
        layer=with_waiting(parts.layer, traffic.layer),
        head=with_waiting(parts.head, traffic.head),
    )


def tensor_link(cluster: ClusterConfig, tp: int) -> Link | None:
    """Between the ranks of a tp group; None where the cluster is not described."""
    in_node = cluster.gpus_per_node is None or tp <= cluster.gpus_per_node
    return _link(cluster, cluster.intra_node_gb_s if in_node else cluster.inter_node_gb_s)


def stage_message(config: Config, load: Workload) -> Traffic:
    """From one pipeline stage to the next or back, for one microbatch."""
    shards = config.parallel.tp if config.parallel.sequence_parallel else 1
    size = load.num_tokens * config.model.language.hidden_size * activation_bytes(config)
    return _waits(size / shards)


def gradient_traffic(config: Config, trained: int, *, dp: int) -> Traffic:
    """Gradients of ``trained`` parameters over the dp ranks, in fp32."""
    if dp == 1:
        return Traffic()
    times = 2 if config.optimizer.zero is Zero.deepspeed else 1  # it all-reduces
    return _waits(times * (dp - 1) / dp * trained * 4)


def weight_traffic(config: Config, trained: int, *, dp: int) -> Traffic:
    """Updated weights, gathered over the dp ranks."""
    return _waits((dp - 1) / dp * trained * activation_bytes(config)) if dp > 1 else Traffic()


def _layer(config: Config, tokens: float) -> PassTraffic:
    """One decoder layer: attention and MLP, each a column- and a row-parallel layer."""
    sharded, recompute = config.parallel.sequence_parallel, config.parallel.recompute
    forward = _waits(2 * tokens, messages=2 if sharded else 1)  # of one of the two
    backward = _column_backward(tokens, sharded=sharded, trains=config.stage.llm.train)
    if sharded:
        backward += _waits(tokens)  # the gradient of the row-parallel layer's output
    again = {
        Recompute.none: 0,
        Recompute.selective: int("mlp" in recompute.modules),
        Recompute.full: 2,
    }[recompute.llm]
    return PassTraffic(forward * 2, backward * 2 + forward * again)


def _vit(config: Config, patches: float) -> PassTraffic:
    """One ViT layer: attention and MLP, as in a decoder layer."""
    sharded = config.parallel.sequence_parallel
    forward = _waits(2 * patches, messages=2 if sharded else 1)
    if not config.stage.vit.train:
        return PassTraffic(forward * 2)
    again = 2 if config.parallel.recompute.vit is Recompute.full else 0
    backward = _column_backward(patches, sharded=sharded, trains=True)
    if sharded:
        backward += _waits(patches)  # the gradient of the row-parallel layer's output
    return PassTraffic(forward * 2, backward * 2 + forward * again)


def _column_backward(tokens: float, *, sharded: bool, trains: bool) -> Traffic:
    """Input gradients summed; with sequence parallelism the input is gathered again for the weight.

    Both beside a matrix product where the weight trains.
    """
    if not trains:
        return _waits(tokens if sharded else 2 * tokens)
    return Traffic(sent=2 * tokens)


def _waits(size: float, *, messages: int = 1) -> Traffic:
    return Traffic(size, size, messages)


def _link(cluster: ClusterConfig, line_rate_gb_s: float | None) -> Link | None:
    share, latency = cluster.link_efficiency, cluster.latency_us
    if line_rate_gb_s is None or share is None or latency is None:
        return None
    return Link(line_rate_gb_s * 1e9 * share, latency / 1e6)
