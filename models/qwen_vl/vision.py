"""The vision tower: all images of a pack in one sequence, one attention segment per frame.

With windows, most layers have a segment for each of those instead (window.py).

With sequence parallelism each rank embeds, normalises and adds its own patches only.

P patches of all images and frames, Q of them with padding to a multiple of tp, E ViT width,
D head_dim.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.configs.model_schema import VisionConfig
from triptych.configs.schema import ParallelConfig, Precision
from triptych.data.media.image import normalize_patches
from triptych.models.attention import Segments
from triptych.models.kernels import KernelTable
from triptych.models.norm import mark_shared
from triptych.models.qwen_vl.layers import vision_block
from triptych.models.qwen_vl.transformer_configs import vision_transformer
from triptych.models.qwen_vl.window import WindowOrder
from triptych.parallel.device import upload
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
        self.vision_config = config
        self.merge = config.spatial_merge_size
        self.head_dim = config.hidden_size // config.num_heads
        self.dtype = DTYPES[precision]
        self.num_shards = place.tp if transformer.sequence_parallel else 1
        self.shard = place.tp_rank if transformer.sequence_parallel else 0
        self.patch_embed = nn.Linear(
            config.patch_dim, config.hidden_size, bias=False, dtype=self.dtype
        )
        mark_shared(self.patch_embed, transformer)
        self.decoder = TransformerBlock(
            transformer,
            vision_block(config, table, overlap_tp_comm=parallel.overlap.tp_comm),
            post_layer_norm=False,
            post_process=False,
        )

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Encode.

        Args:
            pixel_values: (P, patch_dim) uint8 on the device, in patch order.
            grid_thw: (num_images, 3) int64 on the CPU, in unmerged patches.

        Returns:
            (P, E), in merge order: four neighbours of one token follow each other.
        """
        num_patches, device = len(pixel_values), pixel_values.device
        partitions = [frame_bounds(grid_thw)]
        angles_PD = vision_angles(grid_thw, self.merge, self.head_dim)
        order = self._window_order(grid_thw)
        if order is not None:
            partitions.append(order.bounds)
            angles_PD, pixel_values = order.arrange(angles_PD), order.arrange(pixel_values)
        if padding := -num_patches % self.num_shards:
            partitions = [[*bounds, num_patches + padding] for bounds in partitions]
            angles_PD = F.pad(angles_PD, (0, 0, 0, padding))
            pixel_values = F.pad(pixel_values, (0, 0, 0, padding))
        shard = pixel_values.chunk(self.num_shards)[self.shard]
        h_QE = self.decoder(
            hidden_states=self.patch_embed(normalize_patches(shard).to(self.dtype)).unsqueeze(1),
            attention_mask=None,
            rotary_pos_emb=upload(angles_PD, device)[:, None, None, :],
            packed_seq_params=Segments(device, *partitions),
        ).squeeze(1)
        if self.num_shards > 1:  # each rank's merger gives the whole gradient, not a part of it
            h_QE = gather_from_sequence_parallel_region(h_QE, tensor_parallel_output_grad=False)
        encoded: Tensor = h_QE[:num_patches]
        return encoded if order is None else order.restore(encoded)

    def _window_order(self, grid_thw: Tensor) -> WindowOrder | None:
        windows = self.vision_config.window_size > 0
        return WindowOrder.of(grid_thw, self.vision_config) if windows else None


def frame_bounds(grid_thw: Tensor) -> list[int]:
    """Boundaries of the attention segments: one per frame of every image or video. Starts at 0."""
    frames = [h * w for t, h, w in grid_thw.tolist() for _ in range(t)]
    return list(accumulate(frames, initial=0))


def patch_positions(grid_thw: Tensor, merge: int) -> Tensor:
    """Row and column of every patch, in merge order. Returns (P, 2) int64."""
    positions = []
    for t, h, w in grid_thw.tolist():
        rows = torch.arange(h).view(-1, 1).expand(h, w)
        columns = torch.arange(w).view(1, -1).expand(h, w)
        tiled = (
            x.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
            for x in (rows, columns)
        )
        positions.append(torch.stack(list(tiled), dim=-1).repeat(t, 1))
    return torch.cat(positions)


def vision_angles(grid_thw: Tensor, merge: int, head_dim: int) -> Tensor:
    """Angles of the 2D rotary embedding, fp32 on the CPU.

    A quarter of the head's dimensions follows the row, a quarter the column, both again for the
    rotated half.

    Returns:
        (P, head_dim) float32.

    Source: transformers modeling_qwen2_vl.py, VisionRotaryEmbedding.
    """
    dim = head_dim // 2
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = (patch_positions(grid_thw, merge).unsqueeze(-1) * frequencies).flatten(1)
    return torch.cat([angles, angles], dim=-1)
