"""Parameters of each model chunk on one rank: exact, by part, sharded by tp or replicated."""

from collections.abc import Sequence
from dataclasses import dataclass

from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import PARTS, Config
from triptych.costs.flops import layer_parameters, parameters


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """Parameters of one part of the model on one rank."""

    sharded: int = 0
    """This rank's share of what tensor parallelism shards."""
    replicated: int = 0
    """The same on every tp rank."""

    @property
    def total(self) -> int:
        """All that this rank holds."""
        return self.sharded + self.replicated

    def __add__(self, other: "ParameterShard") -> "ParameterShard":
        return ParameterShard(self.sharded + other.sharded, self.replicated + other.replicated)


ParameterShards = dict[str, ParameterShard]
"""By part: vit, adapter, llm."""


def chunk_shards(config: Config, layers: Sequence[int]) -> list[ParameterShards]:
    """What each model chunk holds on one rank.

    The first chunk also has ViT, merger and embedding, the last one final norm and head; a tied
    head lies on the last stage a second time, unless that is the first one too.

    Args:
        config: of the run.
        layers: decoder layers of each chunk, as ``layers_per_chunk`` gives them.
    """
    model, tp = config.model, config.parallel.tp
    language, whole = model.language, parameters(model)
    norms = 2 * language.hidden_size
    layer = (layer_parameters(language) - norms) // tp
    chunks = [
        {
            "vit": ParameterShard(),
            "adapter": ParameterShard(),
            "llm": ParameterShard(layer * count, norms * count),
        }
        for count in layers
    ]
    first, last = chunks[0], chunks[-1]
    first["vit"] = _shard(whole.vit, _vit_replicated(model), tp)
    first["adapter"] = ParameterShard(replicated=whole.adapter)
    first["llm"] += ParameterShard(whole.embedding // tp)
    last["llm"] += ParameterShard(replicated=whole.final_norm)
    if not language.tie_word_embeddings or len(chunks) > 1:
        last["llm"] += ParameterShard(whole.embedding // tp)
    return chunks


def pp_stage_shards(config: Config, layers: Sequence[int]) -> list[ParameterShards]:
    """What each pipeline stage holds on one rank: its chunks together."""
    chunks, pp = chunk_shards(config, layers), config.parallel.pp
    return [
        {
            part: sum((chunk[part] for chunk in chunks[stage::pp]), ParameterShard())
            for part in PARTS
        }
        for stage in range(pp)
    ]


def trained(config: Config, shards: ParameterShards) -> int:
    """How many of these parameters train in the run's stage."""
    return sum(shards[part].total for part in PARTS if getattr(config.stage, part).train)


def _shard(whole: int, replicated: int, tp: int) -> ParameterShard:
    return ParameterShard((whole - replicated) // tp, replicated)


def _vit_replicated(model: ModelConfig) -> int:
    """Patch embedding; of each layer two norms and the biases of the row-parallel layers."""
    vision = model.vision
    norms, row_parallel_biases = 2 * (1 + vision.norm_has_bias), 2
    return vision.hidden_size * (vision.patch_dim + vision.depth * (norms + row_parallel_biases))
