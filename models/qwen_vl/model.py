"""Qwen2-VL, one chunk of it: what a pipeline stage holds, or a part of that.

The first one holds ViT, merger, embedding and the first decoder layers; the last one holds the
head. In between there are decoder layers only. megatron-core's GPTModel is the language model; what
this module adds is the way of the pixels into its input.

T tokens of the pack, H width of the language model.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import ParallelConfig, Precision
from triptych.data.batch import Batch
from triptych.data.partition import Partition
from triptych.data.patch_layout import PatchLayout
from triptych.models.attention import Segments
from triptych.models.kernels import KernelTable
from triptych.models.kv_cache import KeyValueCache
from triptych.models.parameters import mark_sharding
from triptych.models.qwen_vl.language import LanguageModel
from triptych.models.qwen_vl.layers import language_block
from triptych.models.qwen_vl.merger import Merger
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.qwen_vl.transformer_configs import language_transformer
from triptych.models.qwen_vl.vision import VisionTower
from triptych.parallel.mesh import ChunkPlace

from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule


class Qwen2VL(MegatronModule):
    """One chunk of the model."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelConfig,
        precision: Precision,
        layers_per_chunk: Sequence[int],
        place: ChunkPlace,
        kernels: KernelTable,
    ) -> None:
        """Build the chunk of one place, its weights not yet set."""
        transformer = language_transformer(
            config.language, parallel, precision, layers_per_chunk, kernels
        )
        super().__init__(config=transformer)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedule asks for it
        self.pre_process, self.post_process = place.is_first, place.is_last
        overlap = parallel.overlap
        self.vision_config = config.vision
        self.runs_dummy_image = overlap.grad_reduce or overlap.param_gather
        self.share_embeddings_and_output_weights = config.language.tie_word_embeddings
        if self.pre_process:
            self.vision = VisionTower(config.vision, parallel, precision, place, kernels)
            self.merger = Merger(config.vision, config.language, precision)
        self.language = LanguageModel(
            transformer,
            language_block(
                layers_per_chunk[place.number],
                kernels,
                overlap_tp_comm=overlap.tp_comm,
            ),
            vocab_size=config.language.vocab_size,
            max_sequence_length=config.language.max_position_embeddings,
            pre_process=self.pre_process,
            post_process=self.post_process,
            position_embedding_type="mrope",
            rotary_base=config.language.rope_theta,
            share_embeddings_and_output_weights=config.language.tie_word_embeddings,
            scatter_embedding_sequence_parallel=False,
            vp_stage=place.vpp_rank,
        )
        mark_sharding(self, sharding_table(config))

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous chunk's output; called by megatron-core's schedule."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied embedding, where this chunk has it.

        Megatron-core sums its gradient over first and last stage.
        """
        weight: Tensor | None = self.language.shared_embedding_or_output_weight()
        return weight

    def forward(
        self,
        batch: Batch,
        *,
        with_loss: bool = True,
        by_segment: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Run this chunk.

        Args:
            batch: on the device; ``pixel_values`` is needed by the first chunk only, ``labels`` by
                the last only.
            with_loss: False gives logits.
            by_segment: the losses of segments too; without gradients only.
            cache: of prompts that are being continued; gives the next token of each.

        Returns:
            Last chunk: 0-d float64, the summed loss of the tokens that count, or
            (num_segments + 1,), that of each segment and of all, or
            (1, T, vocab / tp) logits, or (num_segments,) int64, the likeliest tokens.
            Other chunks: (T, 1, H) hidden states (T / tp with sequence parallelism).
        """
        hidden_T1H: Tensor = self.language(
            input_ids=None,
            position_ids=batch.position_ids.unsqueeze(1),
            attention_mask=None,
            decoder_input=self._embed(batch) if self.pre_process else None,
            packed_seq_params=Segments(Partition(batch.segments, batch.cu_seqlens), cache=cache),
        )
        if not self.post_process:
            return hidden_T1H
        if cache is not None:
            ids_S: Tensor = self.language.next_token(hidden_T1H, batch.cu_seqlens[1:] - 1)
            return ids_S
        if not with_loss:
            return self.language.logits(hidden_T1H)
        loss: Tensor = self.language.loss(
            hidden_T1H,
            batch.labels,
            batch.supervised_index,
            segment_ends=batch.cu_seqlens[1:] if by_segment else None,
        )
        return loss

    def _embed(self, batch: Batch) -> Tensor:
        """Text embeddings with the ViT's tokens in their places.

        (T, 1, H), cut along T for sequence parallelism.
        """
        h_T1H = self.language.embedding(input_ids=batch.input_ids.unsqueeze(0), position_ids=None)
        if batch.pixel_values is not None and batch.num_patches:
            vision_VH = self._encode_vision(batch.pixel_values, batch.patches)
            h_T1H = h_T1H.index_copy(0, batch.vision_index, vision_VH.unsqueeze(1))
        elif self.runs_dummy_image and (_trains(self.vision) or _trains(self.merger)):
            h_T1H = h_T1H + 0.0 * self._encode_vision(*self._dummy_image)
        if self.config.sequence_parallel:
            # a copy of the shard: it comes as a view, which would keep the whole
            h_T1H = scatter_to_sequence_parallel_region(h_T1H).clone()
        embedded: Tensor = h_T1H
        return embedded

    @cached_property
    def _dummy_image(self) -> tuple[Tensor, PatchLayout]:
        """A black image of one token, for a pack without media; on the device.

        Where gradients or weights travel during the computation, every rank must run every layer
        and have a gradient of every weight, be it 0: megatron-core counts them, and waits for the
        other ranks in the order in which layers run.
        """
        merge, patch_dim = self.vision_config.spatial_merge_size, self.vision_config.patch_dim
        device = self.vision.patch_embed.weight.device
        blank = torch.zeros(merge**2, patch_dim, dtype=torch.uint8, device=device)
        layout = PatchLayout.of(torch.tensor([[1, merge, merge]]), self.vision_config)
        return blank, layout.each(lambda tensor: tensor.to(device))

    def _encode_vision(self, pixel_values: Tensor, patches: PatchLayout) -> Tensor:
        """ViT and merger. A frozen ViT runs without a graph: it keeps no activations."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.vision)):
            h_PE = self.vision(pixel_values, patches)
        merged: Tensor = self.merger(h_PE)
        return merged


def _trains(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
