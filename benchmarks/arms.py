"""Ways to make the same step: ours, and transformers padded, grouped by length, and packed.

A step is the forward and backward pass of one global batch; no side updates weights. Ours goes the
way of a run: engine, schedule and gradient buffers.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.benchmarks.samples import first_fit, num_tokens
from triptych.checkpoints.hf.folder import HFReader
from triptych.checkpoints.hf.model_config import hf_config
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Config
from triptych.data.batch import Batch
from triptych.data.loading.collate import Segment, collate
from triptych.data.media.normalize import normalize_patches
from triptych.data.partition import Partition
from triptych.models.attention import VARLEN_ATTENTIONS, Segments
from triptych.models.kernels import Installed, choose
from triptych.parallel.dtypes import DTYPES
from triptych.parallel.mesh import Mesh
from triptych.train.engine import Engine, build_engine
from triptych.train.step import microbatch_losses

IGNORED = -100
PACKED = "packed"
"""Our core attention, as transformers knows it."""

Arm = Callable[[], float]
"""One step; gives the mean loss."""
Round = tuple[float, dict[str, float]]
"""FLOP/s of a matrix product, and the seconds of each arm."""


def build_both(config: Config, mesh: Mesh) -> tuple[Engine, nn.Module]:
    """Our engine and transformers' model, with the same random weights."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    dtype = DTYPES[config.train.precision]
    with mesh.device:
        sizes = Qwen2VLConfig(**hf_config(config.model))
        model = Qwen2VLForConditionalGeneration(sizes).to(dtype).train()
    engine = build_engine(config, mesh)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.cpu().save_pretrained(folder)
        reader = HFReader(Path(folder), config.model)
        for name, parameter in engine.parameters.items():
            parameter.copy_(reader.read(name))
    engine.optimizer.refresh_master_weights()
    return engine, model.to(mesh.device)


def build_arms(
    engine: Engine, model: nn.Module, config: Config, samples: Sequence[Segment], *, rows: int
) -> dict[str, Arm]:
    """Every way; padded batches have so many ``rows``, packs ``train.seq_len`` tokens."""
    sizes, device = config.model, engine.mesh.device
    by_length = sorted(samples, key=num_tokens)
    register_packed(config)

    def in_rows(samples: Sequence[Segment]) -> list[dict[str, Any]]:
        starts = range(0, len(samples), rows)
        return [padded(samples[at : at + rows], sizes, device) for at in starts]

    return {
        "ours": ours(engine, batches_of(samples, config)),
        "transformers, padded": theirs(model, in_rows(samples), "sdpa"),
        "transformers, grouped by length": theirs(model, in_rows(by_length), "sdpa"),
        "transformers, packed": theirs(
            model,
            [packed(pack, sizes, device) for pack in first_fit(samples, config.train.seq_len)],
            PACKED,
        ),
    }


def batches_of(samples: Sequence[Segment], config: Config) -> list[Batch]:
    """The packs of our arm."""
    packs = first_fit(samples, config.train.seq_len)
    return [_joined(pack, config.model) for pack in packs]


def ours(engine: Engine, batches: Sequence[Batch]) -> Arm:
    """Packs through the engine of a run."""
    num_supervised_tokens = sum(batch.num_supervised_tokens for batch in batches)

    def step() -> float:
        engine.optimizer.zero_grad()
        loss = microbatch_losses(engine.chunks, batches, engine.mesh, forward_only=False).sum()
        return float(loss) / num_supervised_tokens

    return step


def theirs(model: nn.Module, batches: Sequence[dict[str, Any]], attention: str) -> Arm:
    """Batches through transformers, with gradient accumulation; its own loss and its own logits."""
    num_targets = sum(int((batch["labels"][..., 1:] != IGNORED).sum()) for batch in batches)

    def step() -> float:
        model.config.text_config._attn_implementation = attention
        model.zero_grad()
        losses = []
        for batch in batches:
            CURRENT[:] = batch.get(PACKED, [])
            inputs = {key: value for key, value in batch.items() if key != PACKED}
            loss = model(**inputs, num_items_in_batch=num_targets, use_cache=False).loss
            loss.backward()
            losses.append(loss.detach().double())
        return float(torch.stack(losses).sum())

    return step


CURRENT: list[Segments] = []
"""The segments of the pack that transformers is at."""


def register_packed(config: Config) -> None:
    """Let transformers attend to packs with the kernel that ours takes."""
    from transformers import AttentionInterface

    table = choose(config.train.kernels, config.train.precision, Installed.here())
    attend = VARLEN_ATTENTIONS[table.attention.kernel]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls in each layer, with (1, heads, T, head_dim)."""
        q_TND, k_TKD, v_TKD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return attend(q_TND, k_TKD, v_TKD, CURRENT[0], True, module.scaling)[None], None

    AttentionInterface.register(PACKED, attention)


def padded(samples: Sequence[Segment], model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """A batch of rows, each padded to the longest."""
    rows = [_joined([sample], model) for sample in samples]
    width = max(map(num_tokens, samples))

    def fill(tensors: Sequence[Tensor], value: int) -> Tensor:
        pieces = [F.pad(x, (0, width - x.size(-1)), value=value) for x in tensors]
        return torch.stack(pieces).to(device)

    return {
        "input_ids": fill([row.input_ids for row in rows], model.tokens.endoftext),
        "attention_mask": fill([torch.ones_like(row.input_ids) for row in rows], 0),
        "position_ids": fill([row.position_ids for row in rows], 0).transpose(0, 1),
        "labels": fill([_labels([sample]) for sample in samples], IGNORED),
        **_media(_joined(samples, model), device),
    }


def packed(samples: Sequence[Segment], model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """One row of segments."""
    pack = _joined(samples, model)
    return {
        "input_ids": pack.input_ids[None].to(device),
        "attention_mask": {"full_attention": None},
        "position_ids": pack.position_ids[:, None].to(device),
        "labels": _labels(samples)[None].to(device),
        PACKED: [Segments(Partition(pack.segments, pack.cu_seqlens.to(device)))],
        **_media(pack, device),
    }


def _joined(samples: Sequence[Segment], model: ModelConfig) -> Batch:
    return collate(samples, model, pad_to=1, with_pixels=True)


def _labels(samples: Sequence[Segment]) -> Tensor:
    """The ids themselves, where they are targets: transformers shifts them."""
    rows = []
    for sample in samples:
        targets = sample.targets.astype(bool)
        targets[0] = False
        rows.append(np.where(targets, sample.input_ids, IGNORED))
    return torch.from_numpy(np.concatenate(rows).astype(np.int64))


def _media(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    if not batch.num_patches:
        return {}
    assert batch.pixel_values is not None
    pixels = normalize_patches(batch.pixel_values)
    return {"pixel_values": pixels.to(device), "image_grid_thw": batch.grid_thw.to(device)}


def in_turns(
    arms: dict[str, Arm],
    seconds_of: Callable[[Callable[[], object]], float],
    product: tuple[float, Callable[[], object]],
    num_rounds: int,
) -> Iterator[Round]:
    """Every arm once a round, each round from another one on, a matrix product before each.

    Args:
        arms: which have made a step before.
        seconds_of: how long a task takes.
        product: FLOPs of a matrix product, and the product.
        num_rounds: how many.
    """
    flops, multiply = product
    names = list(arms)
    for number in range(num_rounds):
        first = number % len(names)
        seconds, rates = {}, []
        for name in names[first:] + names[:first]:
            rates.append(flops / seconds_of(multiply))
            seconds[name] = seconds_of(arms[name])
        yield statistics.median(rates), seconds


def require_same_loss(losses: dict[str, float], bar: float) -> None:
    """Every arm makes the same step, or nothing is worth timing.

    Raises:
        SystemExit: two arms disagree by more than ``bar``, relative.
    """
    apart = max(losses.values()) / min(losses.values()) - 1
    if not apart <= bar:
        raise SystemExit(f"the arms disagree in the loss of the step: {losses}")
    print(f"loss of the step {min(losses.values()):.6f}; between the arms {apart:.1e} (relative)\n")
