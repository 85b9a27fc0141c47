"""The comparison with transformers notices: each fault that is planted here breaks one of its bars
at least a hundred times over.

    pytest -s tests/models/test_planted_faults.py      # prints the table of docs/parity.md
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from triptych.configs.model_schema import ModelConfig
from triptych.data import patch_layout
from triptych.data.batch import Batch
from triptych.data.loading import collate
from triptych.models.attention import PackedCoreAttention
from triptych.models.qwen_vl import vision
from triptych.models.qwen_vl.merger import Merger
from triptych.models.qwen_vl.model import Qwen2VL
from triptych.parallel.mesh import Mesh
from triptych.tests.helpers.reference import (
    BAR,
    TOKENS,
    Conversation,
    Outcome,
    conversations,
    distance,
    run_reference,
    save_reference,
    small_model,
    transformers_model,
)
from triptych.tests.helpers.single import alone, load_ours, pack, run_ours

Fault = Callable[[pytest.MonkeyPatch, nn.Module], None]


@dataclass(frozen=True)
class Setting:
    """What every fault is planted into."""

    model: ModelConfig
    samples: list[Conversation]
    folder: Path
    theirs: Outcome
    mesh: Mesh

    def piece(self) -> nn.Module:
        """Our model, with the weights of theirs."""
        return load_ours(self.folder, self.model, self.mesh)

    def run(self, monkeypatch: pytest.MonkeyPatch, plant: Fault | None = None) -> Outcome:
        """Our outcome, with a fault or without."""
        piece = self.piece()
        if plant is not None:
            plant(monkeypatch, piece)
        return run_ours(piece, pack(self.samples), self.model)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Iterator[Setting]:
    model = small_model(heads=4, kv_heads=2, tied=False)
    samples = conversations(seed=0)
    reference = transformers_model(model, seed=0)
    folder = save_reference(reference, tmp_path_factory.mktemp("hf"))
    with alone() as mesh:
        yield Setting(model, samples, folder, run_reference(reference, samples), mesh)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    print("", *lines, sep="\n")


# --- ways of planting


def in_batch(change: Callable[[Batch], Batch]) -> Fault:
    """The model sees a batch that is wrong."""

    def plant(monkeypatch: pytest.MonkeyPatch, _: nn.Module) -> None:
        forward = Qwen2VL.forward
        monkeypatch.setattr(
            Qwen2VL, "forward", lambda self, batch, **kw: forward(self, change(batch), **kw)
        )

    return plant


def in_function(module: object, name: str, change: Callable[..., Callable[..., object]]) -> Fault:
    """A function of ours gives way to ``change(it)``."""

    def plant(monkeypatch: pytest.MonkeyPatch, _: nn.Module) -> None:
        monkeypatch.setattr(module, name, change(getattr(module, name)))

    return plant


def without(*names: str) -> Fault:
    """Parameters that are forgotten count as zero."""

    def plant(_: pytest.MonkeyPatch, piece: nn.Module) -> None:
        with torch.no_grad():
            for name in names:
                piece.get_parameter(name).zero_()

    return plant


def in_attention(tower: str, *, causal: bool) -> Fault:
    def plant(_: pytest.MonkeyPatch, piece: nn.Module) -> None:
        for module in piece.get_submodule(tower).modules():
            if isinstance(module, PackedCoreAttention):
                module.causal = causal

    return plant


# --- the faults


def late_text(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Text resumes one position too late after each image."""

    def wrong(input_ids: Tensor, grid_thw: Tensor, **options: int) -> Tensor:
        images_before = (input_ids == TOKENS.vision_end).cumsum(0)
        return build(input_ids, grid_thw, **options) + images_before

    return wrong


def text_after_all_patches(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Text resumes as if each patch of an image had had a position of its own."""

    def wrong(input_ids: Tensor, grid_thw: Tensor, **options: int) -> Tensor:
        right, late = build(input_ids, grid_thw, **options), torch.zeros(len(input_ids))
        ends = (input_ids == TOKENS.vision_end).nonzero().view(-1).tolist()
        for end, (_, h, w) in zip(ends, grid_thw.tolist(), strict=True):
            late[end:] += h * w // 4 - max(h, w) // 2
        return right + late.long()

    return wrong


def first_positions_for_all(batch: Batch) -> Batch:
    """Each segment turned by the pack's first angles, as megatron-core's thd path may do."""
    lengths = np.diff(batch.segments).tolist()
    positions = torch.cat([batch.position_ids[:, :length] for length in lengths], dim=1)
    return replace(batch, position_ids=positions)


def one_segment(batch: Batch) -> Batch:
    return replace(batch, segments=[0, batch.segments[-1]])


def swapped_axes(batch: Batch) -> Batch:
    return replace(batch, position_ids=batch.position_ids[[0, 2, 1]])


def text_positions_for_images(batch: Batch) -> Batch:
    lengths = np.diff(batch.segments).tolist()
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
    return replace(batch, position_ids=positions)


def vision_tokens_reversed(batch: Batch) -> Batch:
    return replace(batch, vision_index=batch.vision_index.flip(0))


def merger_with(gelu: Callable[[Tensor], Tensor]) -> Fault:
    def forward(self: Merger, h_PE: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(self.norm(h_PE).view(-1, self.merged_size))))

    return in_function(Merger, "forward", lambda _: forward)


def rms_epsilon(eps: float) -> Fault:
    def plant(_: pytest.MonkeyPatch, piece: nn.Module) -> None:
        for module in piece.modules():
            if isinstance(module, nn.RMSNorm):
                module.eps = eps

    return plant


def of_imagenet(pixels: Tensor) -> Tensor:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean_P, std_P = (torch.tensor(x).repeat_interleave(392) for x in (mean, std))
    return (pixels.float() / 255 - mean_P) / std_P


LLM_QKV_BIAS = "language.decoder.layers.1.self_attention.linear_qkv.bias"
FAULTS: dict[str, Fault] = {
    "LLM: height and width swapped": in_batch(swapped_axes),
    "LLM: text one position late after an image": in_function(
        collate, "build_position_ids", late_text
    ),
    "LLM: text resumes after all patches": in_function(
        collate, "build_position_ids", text_after_all_patches
    ),
    "LLM: images take text positions": in_batch(text_positions_for_images),
    "LLM: the pack's first angles in each segment": in_batch(first_positions_for_all),
    "LLM: segments see each other": in_batch(one_segment),
    "LLM: not causal": in_attention("language", causal=False),
    "LLM: QKV bias of one layer dropped": without(LLM_QKV_BIAS),
    "ViT: height and width swapped": in_function(
        patch_layout, "patch_positions", lambda right: lambda *x: right(*x).flip(-1)
    ),
    "ViT: causal": in_attention("vision", causal=True),
    "ViT: images see each other": in_function(
        patch_layout, "frame_bounds", lambda right: lambda grids: [0, right(grids)[-1]]
    ),
    "ViT: QKV bias of one layer dropped": without(
        "vision.decoder.layers.0.self_attention.linear_qkv.bias"
    ),
    "ViT: MLP bias of one layer dropped": without("vision.decoder.layers.1.mlp.linear_fc2.bias"),
    "ViT: ImageNet's mean and deviation": in_function(
        vision, "normalize_patches", lambda _: of_imagenet
    ),
    "merger: bias dropped": without("merger.fc2.bias"),
    "merger: quick GELU": merger_with(lambda x: x * torch.sigmoid(1.702 * x)),
    "merger: tokens in the wrong places": in_batch(vision_tokens_reversed),
    "loss: mask off by one": in_function(
        collate, "_loss_mask", lambda right: lambda *x: np.roll(right(*x), 1)
    ),
    "loss: mask not shifted to the labels": in_function(
        collate,
        "_loss_mask",
        lambda _: lambda segments, _: np.concatenate([x.targets for x in segments]).astype(bool),
    ),
}


SUBTLE_FAULTS: dict[str, Fault] = {
    "merger: GELU by tanh": merger_with(lambda x: nn.functional.gelu(x, approximate="tanh")),
    "LLM: RMSNorm epsilon 1e-5": rms_epsilon(1e-5),
}


def test_without_a_fault_the_bars_hold(setting, monkeypatch):
    assert distance(setting.run(monkeypatch), setting.theirs).times(BAR).largest <= 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_breaks_a_bar_a_hundred_times_over(name, setting, monkeypatch, table):
    broken = distance(setting.run(monkeypatch, FAULTS[name]), setting.theirs).times(BAR)
    table.append(f"{name:45} {broken}")
    assert broken.largest >= 100


@pytest.mark.parametrize("name", SUBTLE_FAULTS)
def test_a_subtle_fault_breaks_a_bar(name, setting, monkeypatch, table):
    broken = distance(setting.run(monkeypatch, SUBTLE_FAULTS[name]), setting.theirs).times(BAR)
    table.append(f"{name:45} {broken}")
    assert broken.largest >= 2


# --- what logits and gradients cannot show is compared by itself


def test_epsilon_of_every_layer_norm(setting):
    """1e-5 in the ViT would move gradients by half a bar: its inputs are far from constant."""
    norms = [m for m in setting.piece().modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * setting.model.vision.depth + 1  # two a layer, one in the merger
    assert {norm.eps for norm in norms} == {1e-6}


def hand_made_pack() -> Batch:
    """Text, a 2x3 image between its marks, an end; three text tokens; three of padding."""
    image = Conversation(
        np.array([20, 9, *[12] * 6, 10, 2], np.int32), np.ones(10, np.uint8), [(1, 4, 6)]
    )
    text = Conversation(np.array([21, 22, 2], np.int32), np.ones(3, np.uint8))
    return pack([image, text], pad_to=4)


HAND_MADE_POSITIONS = [
    [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 0, 1, 2, 0, 1, 2],
    [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 0, 1, 2, 0, 1, 2],
    [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1, 2],
]


def not_restarted(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Each segment of a pack goes on where the one before stopped."""
    start = 0

    def wrong(*args: Tensor, **options: int) -> Tensor:
        nonlocal start
        positions = build(*args, **options) + start
        start = int(positions.max()) + 1
        return positions

    return wrong


def test_positions_of_a_pack_equal_those_made_by_hand():
    assert hand_made_pack().position_ids.tolist() == HAND_MADE_POSITIONS


def test_positions_that_do_not_restart_show_in_the_positions_only(setting, monkeypatch, table):
    """Rotary attention sees differences of positions: all of a segment moved alike changes nothing
    but rounding, and no bar on logits can be broken. The positions themselves are compared.
    """
    fault = in_function(collate, "build_position_ids", not_restarted)
    moved = distance(setting.run(monkeypatch, fault), setting.theirs).times(BAR)
    table.append(f"{'LLM: positions not restarted in a pack':45} {moved}")
    assert moved.largest <= 1
    assert hand_made_pack().position_ids.tolist() != HAND_MADE_POSITIONS
