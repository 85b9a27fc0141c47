"""Bytes of a number."""

from triptych.configs.schema import Config, Precision

FP32 = 4


def activation_bytes(config: Config) -> int:
    """Bytes of an activation or weight: 2 in bf16, 4 in fp32."""
    return 2 if config.train.precision is Precision.bf16 else FP32
