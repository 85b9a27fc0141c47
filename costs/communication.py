"""Bytes between ranks, and the seconds in which nothing is computed meanwhile.

Collectives are counted as rings: of n ranks, an all-gather or reduce-scatter of B bytes sends
(n - 1) / n * B from each rank, an all-reduce twice that. Which of them wait and which run beside a
matrix product is how megatron-core 0.16.1 does it (tensor_parallel/layers.py): the backward pass of
a column-parallel layer that trains hides its communication, everything else waits. With
``parallel.overlap.tp_comm`` all layers hide theirs (models/linear.py), and only latency is left.
"""

from dataclasses import dataclass, replace

from triptych.configs.schema import ClusterConfig, Config, Recompute, Zero
from triptych.costs.compute import PartCompute, PassCompute, part_compute
from triptych.costs.element_sizes import activation_bytes
from triptych.costs.flops import Workload


@dataclass(frozen=True, slots=True)
class Communication:
    """What one rank sends."""

    bytes_sent: float = 0.0
    exposed_bytes: float = 0.0
    """Those of them that nothing is computed beside: they are waited for."""
    exposed_messages: int = 0
    """Collectives or messages that carry the exposed bytes."""

    def __add__(self, other: "Communication") -> "Communication":
        return Communication(
            self.bytes_sent + other.bytes_sent,
            self.exposed_bytes + other.exposed_bytes,
            self.exposed_messages + other.exposed_messages,
        )

    def __mul__(self, count: int) -> "Communication":
        return Communication(
            self.bytes_sent * count, self.exposed_bytes * count, self.exposed_messages * count
        )


@dataclass(frozen=True, slots=True)
class Link:
    """How fast a group of ranks exchanges data."""

    bytes_per_s: float
    latency_s: float

    def seconds(self, sent: Communication) -> float:
        """Seconds that are waited for."""
        return sent.exposed_bytes / self.bytes_per_s + sent.exposed_messages * self.latency_s


@dataclass(frozen=True, slots=True)
class Links:
    """The links of each axis. Ranks are ordered tp (fastest), dp, pp."""

    tp: Link
    pp: Link
    dp: Link

    @classmethod
    def of(cls, cluster: ClusterConfig, *, tp: int, pp: int, dp: int) -> "Links":
        """The links that axes get, which stay within a node or leave it; the cluster is described.

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
class PassCommunication:
    """What one microbatch exchanges over the tp ranks, by pass."""

    forward: Communication = Communication()
    backward: Communication = Communication()

    def __add__(self, other: "PassCommunication") -> "PassCommunication":
        return PassCommunication(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: int) -> "PassCommunication":
        return PassCommunication(self.forward * count, self.backward * count)

    def beside_products(self) -> "PassCommunication":
        """The same bytes, all hidden; the latency of each message is still waited for."""
        return PassCommunication(
            replace(self.forward, exposed_bytes=0.0), replace(self.backward, exposed_bytes=0.0)
        )


@dataclass(frozen=True, slots=True)
class TensorCommunication:
    """What tensor and sequence parallelism send, by the parts that a split tells apart."""

    vision: PassCommunication
    """Pixels, ViT, embedding."""
    layer: PassCommunication
    """One decoder layer."""
    head: PassCommunication

    def of_chunks(self, layers: tuple[int, ...]) -> list[PassCommunication]:
        """What each model chunk exchanges."""
        chunks = [self.layer * count for count in layers]
        chunks[0] += self.vision
        chunks[-1] += self.head
        return chunks


def tensor_communication(config: Config, load: Workload) -> TensorCommunication:
    """What one rank sends for a microbatch, by part of the model."""
    tp = config.parallel.tp
    if tp == 1:
        return TensorCommunication(PassCommunication(), PassCommunication(), PassCommunication())
    unit = (tp - 1) / tp * activation_bytes(config)
    llm, vision = config.model.language, config.model.vision
    tokens = load.num_tokens * llm.hidden_size * unit
    patches = load.num_patches * vision.hidden_size * unit
    sharded, trains = config.parallel.sequence_parallel, config.stage.llm.train
    embedding = PassCommunication(
        forward=_exposed(2 * tokens) + _exposed(load.num_patches * vision.patch_dim),
        backward=_exposed(tokens) if sharded else Communication(),
    )
    if sharded:  # what leaves the ViT, gathered for the merger
        embedding += PassCommunication(forward=_exposed(patches))
    vit, layer = _vit(config, patches) * vision.depth, _layer(config, tokens)
    if config.parallel.overlap.tp_comm:
        vit, layer = vit.beside_products(), layer.beside_products()
    return TensorCommunication(
        vision=embedding + vit,
        layer=layer,
        head=PassCommunication(
            forward=(_exposed(tokens) if sharded else Communication()) + _exposed(0, messages=3),
            backward=_column_backward(tokens, sharded=sharded, trains=trains),
        ),
    )


def part_duration(config: Config, load: Workload) -> PartCompute:
    """How long each part of the model takes, in FLOPs at peak rate, as ``part_compute`` counts.

    Where the cluster is described, waiting for the other tp ranks is included.
    """
    parts, cluster = part_compute(config, load), config.cluster
    link = tensor_link(cluster, config.parallel.tp)
    if link is None or cluster.peak_tflops is None:
        return parts
    rate, exchanged = cluster.peak_tflops * 1e12, tensor_communication(config, load)

    def with_waiting(compute: PassCompute, sent: PassCommunication) -> PassCompute:
        forward, backward = link.seconds(sent.forward), link.seconds(sent.backward)
        return compute + PassCompute(forward * rate, backward * rate)

    return PartCompute(
        vision=with_waiting(parts.vision, exchanged.vision),
        layer=with_waiting(parts.layer, exchanged.layer),
        head=with_waiting(parts.head, exchanged.head),
    )


def tensor_link(cluster: ClusterConfig, tp: int) -> Link | None:
    """The link between the ranks of a tp group; None where the cluster is not described."""
    in_node = cluster.gpus_per_node is None or tp <= cluster.gpus_per_node
    return _link(cluster, cluster.intra_node_gb_s if in_node else cluster.inter_node_gb_s)


def pp_message(config: Config, load: Workload) -> Communication:
    """A message from one pp stage to the next or back, for one microbatch."""
    shards = config.parallel.tp if config.parallel.sequence_parallel else 1
    size = load.num_tokens * config.model.language.hidden_size * activation_bytes(config)
    return _exposed(size / shards)


def gradient_communication(config: Config, trained: int, *, dp: int) -> Communication:
    """Gradients of ``trained`` parameters over the dp ranks, in fp32."""
    if dp == 1:
        return Communication()
    times = 2 if config.optimizer.zero is Zero.deepspeed else 1  # it all-reduces
    return _exposed(times * (dp - 1) / dp * trained * 4)


def weight_communication(config: Config, trained: int, *, dp: int) -> Communication:
    """Updated weights, gathered over the dp ranks."""
    return (
        _exposed((dp - 1) / dp * trained * activation_bytes(config)) if dp > 1 else Communication()
    )


def _layer(config: Config, tokens: float) -> PassCommunication:
    """One decoder layer: attention and MLP, each a column- and a row-parallel layer."""
    sharded, recompute = config.parallel.sequence_parallel, config.parallel.recompute
    forward = _exposed(2 * tokens, messages=2 if sharded else 1)  # of one of the two
    backward = _column_backward(tokens, sharded=sharded, trains=config.stage.llm.train)
    if sharded:
        backward += _exposed(tokens)  # the gradient of the row-parallel layer's output
    again = {
        Recompute.none: 0,
        Recompute.selective: int("mlp" in recompute.modules),
        Recompute.full: 2,
    }[recompute.llm]
    return PassCommunication(forward * 2, backward * 2 + forward * again)


def _vit(config: Config, patches: float) -> PassCommunication:
    """One ViT layer: attention and MLP, as in a decoder layer."""
    sharded = config.parallel.sequence_parallel
    forward = _exposed(2 * patches, messages=2 if sharded else 1)
    if not config.stage.vit.train:
        return PassCommunication(forward * 2)
    again = 2 if config.parallel.recompute.vit is Recompute.full else 0
    backward = _column_backward(patches, sharded=sharded, trains=True)
    if sharded:
        backward += _exposed(patches)  # the gradient of the row-parallel layer's output
    return PassCommunication(forward * 2, backward * 2 + forward * again)


def _column_backward(tokens: float, *, sharded: bool, trains: bool) -> Communication:
    """Input gradients summed; with sequence parallelism the input is gathered again for the weight.

    Both beside a matrix product where the weight trains.
    """
    if not trains:
        return _exposed(tokens if sharded else 2 * tokens)
    return Communication(bytes_sent=2 * tokens)


def _exposed(size: float, *, messages: int = 1) -> Communication:
    return Communication(size, size, messages)


def _link(cluster: ClusterConfig, line_rate_gb_s: float | None) -> Link | None:
    share, latency = cluster.link_efficiency, cluster.latency_us
    if line_rate_gb_s is None or share is None or latency is None:
        return None
    return Link(line_rate_gb_s * 1e9 * share, latency / 1e6)
