"""Parameters under names that no layout changes, their part, and megatron-core's marks on them."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from triptych.configs.schema import Part
from triptych.models.sharding import ShardingTable, TensorSharding

_PART_PREFIXES = {"vision.": Part.VIT, "merger.": Part.ADAPTER, "language.": Part.LLM}


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its global name."""
    return next(part for prefix, part in _PART_PREFIXES.items() if name.startswith(prefix))


def mark_sharding(model: nn.Module, table: ShardingTable) -> None:
    """Tell megatron-core which parameters are pieces: replicas count once in the gradient norm.

    megatron-core marks them while it initialises weights; we initialise them ourselves
    (models/init.py), so we mark them too.
    """
    for name, parameter in model.named_parameters():
        sharding = table[name]
        if sharding is not TensorSharding.REPLICATED:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # megatron's mark
            parameter.partition_dim = 1 if sharding is TensorSharding.COLUMNS else 0  # type: ignore[attr-defined]
            parameter.partition_stride = 2 if sharding is TensorSharding.GATED_ROWS else 1  # type: ignore[attr-defined]


def global_parameters(chunks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters; decoder layers are counted from the whole model's first."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _global_name(chunk, name), parameter


def _global_name(model: nn.Module, name: str) -> str:
    prefix, found, rest = name.partition(".decoder.layers.")
    if not found:
        return name
    index, _, leaf = rest.partition(".")
    layers: Any = model.get_submodule(f"{prefix}.decoder.layers")
    return f"{prefix}.decoder.layers.{layers[int(index)].layer_number - 1}.{leaf}"
