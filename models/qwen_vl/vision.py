"""The vision tower: all images of a pack in one sequence, one attention segment per frame.

With windows, most layers have a segment for each of those instead (data/window.py).

With sequence parallelism each rank embeds, normalises and adds its own patches only.

P patches of all images and frames, Q of them with padding to a multiple of tp, E ViT width,
D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.configs.model_schema import VisionConfig
from triptych.configs.schema import ParallelConfig, Precision
from triptych.data.media.normalize import normalize_patches
from triptych.data.patch_layout import PatchLayout
from triptych.models.attention import Segments
from triptych.models.kernels import KernelTable
from triptych.models.norm import mark_shared
from triptych.models.qwen_vl.layers import vision_block
from triptych.models.qwen_vl.transformer_configs import vision_transformer
from triptych.parallel.dtypes import DTYPES
from triptych.parallel.mesh import ChunkPlace

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

ROPE_THETA = 10000.0


class VisionTower(MegatronModule):
    """Patch embedding and ViT layers, sharded over tp with the language model.

    The patch embedding is a linear map over flattened 3D patches, equal to the convolution because
    its kernel is its stride.
    """

    def __init__(
        self,
        config: VisionConfig,
        parallel: ParallelConfig,
        precision: Precision,
        place: ChunkPlace,
        table: KernelTable,
    ) -> None:
        transformer = vision_transformer(config, parallel, precision, table)
        super().__init__(config=transformer)
        self.dtype = DTYPES[precision]
        self.num_shards = place.tp if transformer.sequence_parallel else 1
        self.shard = place.tp_rank if transformer.sequence_parallel else 0
        self.patch_embed = nn.Linear(
            config.patch_dim, config.hidden_size, bias=False, dtype=self.dtype
        )
        mark_shared(self.patch_embed, transformer)
        dim = config.hidden_size // config.num_heads // 2
        frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.decoder = TransformerBlock(
            transformer,
            vision_block(config, table, overlap_tp_comm=parallel.overlap.tp_comm),
            post_layer_norm=False,
            post_process=False,
        )

    def forward(self, pixel_values: Tensor, patches: PatchLayout) -> Tensor:
        """Encode.

        Args:
            pixel_values: (P, patch_dim) uint8 on the device, in patch order.
            patches: their layout, on the device.

        Returns:
            (P, E), in merge order: four neighbours of one token follow each other.
        """
        num_patches, positions = len(pixel_values), patches.positions
        order, partitions = patches.windows, [patches.frames]
        if order is not None:
            partitions.append(order.windows)
            pixel_values = order.arrange(pixel_values)
        if padding := -num_patches % self.num_shards:
            partitions = [each.extended(num_patches + padding) for each in partitions]
            positions = F.pad(positions, (0, 0, 0, padding))
            pixel_values = F.pad(pixel_values, (0, 0, 0, padding))
        shard = pixel_values.chunk(self.num_shards)[self.shard]
        h_QE = self.decoder(
            hidden_states=self.patch_embed(normalize_patches(shard).to(self.dtype)).unsqueeze(1),
            attention_mask=None,
            rotary_pos_emb=vision_angles(positions, self.frequencies)[:, None, None, :],
            packed_seq_params=Segments(*partitions),
        ).squeeze(1)
        if self.num_shards > 1:  # each rank's merger gives the whole gradient, not a part of it
            h_QE = gather_from_sequence_parallel_region(h_QE, tensor_parallel_output_grad=False)
        encoded: Tensor = h_QE[:num_patches]
        return encoded if order is None else order.restore(encoded)


def vision_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles of the 2D rotary embedding.

    A quarter of the head's dimensions follows the row, a quarter the column, both again for the
    rotated half.

    Args:
        positions: (P, 2) int64, row and column.
        frequencies: (head_dim / 4,) float32.

    Returns:
        (P, head_dim) float32.

    Source: transformers modeling_qwen2_vl.py, VisionRotaryEmbedding.
    """
    angles = (positions.unsqueeze(-1) * frequencies).flatten(1)
    return torch.cat([angles, angles], dim=-1)
