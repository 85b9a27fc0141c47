"""The adapter between ViT and language model."""

import torch.nn.functional as F
from torch import Tensor, nn

from triptych.configs.model_schema import LanguageConfig, VisionConfig, VisionNorm
from triptych.configs.schema import Precision
from triptych.parallel.dtypes import DTYPES


class Merger(nn.Module):
    """Joins neighbouring patches, 2x2 in the released models, into one token of the language model.

    Replicated over tp: it has few parameters.
    """

    def __init__(
        self, vision: VisionConfig, language: LanguageConfig, precision: Precision
    ) -> None:
        super().__init__()
        dtype = DTYPES[precision]
        self.merged_size = vision.hidden_size * vision.spatial_merge_size**2
        norm = nn.LayerNorm if vision.norm is VisionNorm.layernorm else nn.RMSNorm
        self.norm = norm(vision.hidden_size, eps=1e-6, dtype=dtype)
        self.fc1 = nn.Linear(self.merged_size, self.merged_size, dtype=dtype)
        self.fc2 = nn.Linear(self.merged_size, language.hidden_size, dtype=dtype)

    def forward(self, h_PE: Tensor) -> Tensor:
        """(P, E) in merge order -> (P / 4, language hidden size)."""
        merged: Tensor = self.fc2(F.gelu(self.fc1(self.norm(h_PE).view(-1, self.merged_size))))
        return merged
