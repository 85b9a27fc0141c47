"""torch's name of a precision."""

import torch

from triptych.configs.schema import Precision

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
"""The dtype of weights and activations."""
