"""Bytes that a microbatch keeps on one rank from its forward to its backward pass.

Every term below is a tensor that autograd saves, by its shape; ids, masks and the one number per
row that a norm keeps are left out, as they are bytes where the rest is megabytes. Checked against
one real rank (models/fake_rank.py, tests/models/test_fake_rank.py).

    T, S   tokens of a microbatch; of them on this rank, S = T / tp with sequence parallelism
    P      ViT patches
    h, E   width of the language model, of the ViT
    b      bytes of an activation: 2 in bf16, 4 in fp32
"""

from collections.abc import Sequence
from dataclasses import dataclass

from triptych.configs.model_schema import VisionNorm
from triptych.configs.schema import Config, Precision, Recompute
from triptych.costs.element_sizes import FP32, activation_bytes
from triptych.costs.flops import Workload

ROTARY_TABLES = 4
"""Cosine and sine, once for the queries and once for the keys of every layer."""


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """Which kernels a device has: a fused one keeps its input only."""

    norm: bool
    """RMSNorm. Unfused, it keeps its input in fp32, and the normalised input."""
    attention: bool
    """Over packed segments, in bf16. Unfused, its output is put together from the segments'."""


GPU = DeviceKernels(norm=True, attention=True)
CPU = DeviceKernels(norm=False, attention=False)


@dataclass(frozen=True, slots=True)
class SavedActivations:
    """Bytes of one microbatch in one model chunk, from its forward to its backward pass."""

    vision: int = 0
    """ViT and merger."""
    layers: int = 0
    """Decoder layers."""
    head: int = 0
    """Final norm and loss."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.vision + self.layers + self.head


@dataclass(frozen=True, slots=True)
class Activations:
    """What is kept of a microbatch, as a function of recomputation, freezing and kernels."""

    config: Config
    load: Workload
    """The microbatch."""
    kernels: DeviceKernels

    def of_chunks(self, layers: Sequence[int]) -> list[SavedActivations]:
        """Of each model chunk; ``layers`` as ``layers_per_chunk`` gives them."""
        last = len(layers) - 1
        return [
            SavedActivations(
                vision=self.vision() if chunk == 0 else 0,
                layers=self.decoder_layers(count),
                head=self.head() if chunk == last else 0,
            )
            for chunk, count in enumerate(layers)
        ]

    def vision(self) -> int:
        """Patch embedding, ViT and merger; nothing of what is frozen and has nothing before it."""
        vision, stage = self.config.model.vision, self.config.stage
        width = self.load.num_patches * vision.hidden_size * self._b
        kept = 0
        if stage.vit.train:
            recompute = self.config.parallel.recompute.vit is Recompute.full
            angles = self.load.num_patches * vision.hidden_size // vision.num_heads * FP32
            layer = width // self._shards if recompute else self.vit_layer()
            pixels = self.load.num_patches // self._shards * vision.patch_dim * self._b
            kept += vision.depth * layer + pixels + angles * recompute
        if stage.vit.train or stage.adapter.train:
            # into the norm and the GELU, out of the merger where its tokens take their places
            merged = self.load.num_patches // vision.patches_per_token
            values = self.load.num_patches * vision.hidden_size
            norm = self._vision_norm(values, trains=stage.adapter.train, gradient=stage.vit.train)
            kept += norm + width + merged * self.config.model.language.hidden_size * self._b
        if stage.adapter.train:
            kept += 2 * width  # into the two linear layers
        return kept

    def vit_layer(self) -> int:
        """One layer of the ViT that trains, without recomputation."""
        vision, tp = self.config.model.vision, self.config.parallel.tp
        inner, shard = vision.hidden_size // tp, vision.hidden_size // self._shards
        per_patch = (
            2 * shard  # out of the norms, into the linear layers
            + 3 * inner  # queries, keys and values, of which the values are a view
            + 2 * inner  # queries and keys, turned
            + ROTARY_TABLES * vision.hidden_size // vision.num_heads
            + inner * (1 if self._fused_attention else 2)  # out of attention
            + vision.fc1_size // tp  # into the activation
            + vision.intermediate_size // tp  # out of it, into the linear layer
        )
        logsumexp = vision.num_heads // tp * FP32
        norm = self._vision_norm(self.load.num_patches * shard, trains=True, gradient=True)
        return 2 * norm + self.load.num_patches * (per_patch * self._b + logsumexp)

    def decoder_layers(self, count: int) -> int:
        """``count`` decoder layers."""
        language = self.config.model.language
        recompute = self.config.parallel.recompute.llm is Recompute.full
        width = language.hidden_size * self._b
        kept = count * (self._rows * width if recompute else self.decoder_layer(self._modules))
        kept += self.load.num_tokens * language.head_dim * FP32 * recompute  # rotary angles
        return kept

    def decoder_layer(self, recomputed: Sequence[str] = ()) -> int:
        """One decoder layer, of which the named modules are recomputed."""
        return self._attention("core_attn" in recomputed) + self._mlp("mlp" in recomputed)

    def recomputed(self) -> int:
        """What a decoder layer's backward pass makes again, for as long as it lasts."""
        if self.config.parallel.recompute.llm is Recompute.full:
            return self.decoder_layer()
        return self.decoder_layer() - self.decoder_layer(self._modules)

    def _attention(self, recompute_core: bool) -> int:
        """Norm and attention."""
        language, tp = self.config.model.language, self.config.parallel.tp
        trains = self.config.stage.llm.train
        heads, kv_heads = language.num_heads // tp, language.num_kv_heads // tp
        fused = self._fused_attention
        per_token = (heads + 2 * kv_heads) * language.head_dim  # as projected; values are a view
        per_token += (heads + kv_heads) * language.head_dim  # queries and keys, turned
        per_token += ROTARY_TABLES * language.head_dim
        per_token += heads * language.head_dim * (fused or not recompute_core)  # out of attention
        per_token += heads * language.head_dim * (not fused and trains)  # put together
        logsumexp = 0 if recompute_core else heads * FP32
        into_linear = self._rows * language.hidden_size * self._b * trains
        return self._norm() + into_linear + self.load.num_tokens * (per_token * self._b + logsumexp)

    def _mlp(self, recompute: bool) -> int:
        """Norm and SwiGLU."""
        language, trains = self.config.model.language, self.config.stage.llm.train
        into_linear = self._rows * language.hidden_size * self._b
        if recompute:
            return self._norm() + into_linear
        width = language.intermediate_size // self.config.parallel.tp
        times = 2 + trains  # gate and up, into SwiGLU; out of it, into the linear layer
        return self._norm() + into_linear * trains + self.load.num_tokens * times * width * self._b

    def head(self) -> int:
        """Final norm, and the gradients that the loss makes in its forward pass (models/loss.py).

        Text counts as supervised: what a prompt leaves out is not known here.
        """
        language, tp = self.config.model.language, self.config.parallel.tp
        merge = self.config.model.vision.spatial_merge_size
        rows = self.load.num_tokens - self.load.num_patches // merge**2
        rows += language.vocab_size // tp * self.config.stage.llm.train  # of the weight
        return self._norm() + rows * language.hidden_size * self._b

    def _norm(self) -> int:
        """What an RMSNorm of the language model keeps of its S rows."""
        values = self._rows * self.config.model.language.hidden_size
        return self._rms_norm(values, trains=self.config.stage.llm.train, gradient=True)

    def _vision_norm(self, values: int, *, trains: bool, gradient: bool) -> int:
        """What a norm of ViT or merger keeps of its values; a LayerNorm is one kernel anywhere."""
        if self.config.model.vision.norm is VisionNorm.layernorm:
            return values * self._b
        return self._rms_norm(values, trains=trains, gradient=gradient)

    def _rms_norm(self, values: int, *, trains: bool, gradient: bool) -> int:
        """What an RMSNorm keeps for the gradients of its weight and of its input."""
        return values * (self._b if self.kernels.norm else FP32 * (trains + gradient))

    @property
    def _modules(self) -> Sequence[str]:
        """What is recomputed selectively."""
        recompute = self.config.parallel.recompute
        return recompute.modules if recompute.llm is Recompute.selective else ()

    @property
    def _rows(self) -> int:
        """S."""
        return self.load.num_tokens // self._shards

    @property
    def _shards(self) -> int:
        """Of a sequence, where it is cut by tp: norms and residuals, in both towers."""
        parallel = self.config.parallel
        return parallel.tp if parallel.sequence_parallel else 1

    @property
    def _fused_attention(self) -> bool:
        return self.kernels.attention and self.config.train.precision is Precision.bf16

    @property
    def _b(self) -> int:
        return activation_bytes(self.config)
