"""How tensor parallelism shards each parameter of a Qwen-VL model, as its description has it."""

from collections.abc import Iterator

from triptych.configs.model_schema import ModelConfig, VisionConfig
from triptych.models.sharding import ShardingTable, TensorSharding

REPLICATED, ROWS = TensorSharding.REPLICATED, TensorSharding.ROWS
COLUMNS, GATED_ROWS = TensorSharding.COLUMNS, TensorSharding.GATED_ROWS

Row = tuple[str, TensorSharding]


def sharding_table(model: ModelConfig) -> ShardingTable:
    """The table of one model: each parameter in it, and nothing else.

    The head is in it also where it is the embedding: the last pp stage has a copy.
    """
    return ShardingTable(
        patterns=dict([*_vision(model.vision), *_merger(model.vision), *_language()]),
        tied=model.language.tie_word_embeddings,
    )


def _vision(config: VisionConfig) -> Iterator[Row]:
    layer = "vision.decoder.layers.*"
    yield "vision.patch_embed.weight", REPLICATED
    yield from _vision_norm(f"{layer}.input_layernorm", config)
    yield from _column_parallel(f"{layer}.self_attention.linear_qkv", ROWS)
    yield from _row_parallel(f"{layer}.self_attention.linear_proj")
    yield from _vision_norm(f"{layer}.pre_mlp_layernorm", config)
    yield from _column_parallel(f"{layer}.mlp.linear_fc1", GATED_ROWS if config.is_gated else ROWS)
    yield from _row_parallel(f"{layer}.mlp.linear_fc2")


def _merger(config: VisionConfig) -> Iterator[Row]:
    for linear in ("merger.fc1", "merger.fc2"):
        yield f"{linear}.weight", REPLICATED
        yield f"{linear}.bias", REPLICATED
    yield from _vision_norm("merger.norm", config)


def _language() -> Iterator[Row]:
    layer = "language.decoder.layers.*"
    yield "language.embedding.word_embeddings.weight", ROWS
    yield f"{layer}.input_layernorm.weight", REPLICATED
    yield from _column_parallel(f"{layer}.self_attention.linear_qkv", ROWS)
    yield f"{layer}.self_attention.linear_proj.weight", COLUMNS
    yield f"{layer}.pre_mlp_layernorm.weight", REPLICATED
    yield f"{layer}.mlp.linear_fc1.weight", GATED_ROWS
    yield f"{layer}.mlp.linear_fc2.weight", COLUMNS
    yield "language.decoder.final_layernorm.weight", REPLICATED
    yield "language.output_layer.weight", ROWS


def _column_parallel(name: str, how: TensorSharding) -> Iterator[Row]:
    """A linear layer whose outputs are sharded: its bias is, too."""
    yield f"{name}.weight", how
    yield f"{name}.bias", how


def _row_parallel(name: str) -> Iterator[Row]:
    """A linear layer whose inputs are sharded: its bias is added once, to the sum."""
    yield f"{name}.weight", COLUMNS
    yield f"{name}.bias", REPLICATED


def _vision_norm(name: str, config: VisionConfig) -> Iterator[Row]:
    yield f"{name}.weight", REPLICATED
    if config.norm_has_bias:
        yield f"{name}.bias", REPLICATED
