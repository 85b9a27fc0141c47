"""The language model: megatron-core's GPTModel, with a loss that never holds a pack's logits."""

from typing import Any

from torch import Tensor, nn

from triptych.models.loss import SummedLoss
from triptych.models.next_token import NextToken

from megatron.core.models.gpt import GPTModel


class LanguageModel(GPTModel):
    """Called, it gives hidden states on every stage.

    The last one has ``loss``, ``next_token`` and ``logits``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.loss, self.next_token = (
                head(
                    self._head_weight(),
                    self.pg_collection.tp,
                    sequence_parallel=self.config.sequence_parallel,
                )
                for head in (SummedLoss, NextToken)
            )

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """What GPTModel calls after its layers, with much that only inference needs."""
        return hidden_states

    def logits(self, hidden_T1H: Tensor) -> Tensor:
        """(1, T, vocab / tp) of every token."""
        logits_T1V, _ = self.output_layer(hidden_T1H, weight=self._head_weight())
        logits: Tensor = logits_T1V.transpose(0, 1).contiguous()
        return logits

    def _head_weight(self) -> nn.Parameter:
        tied = self.share_embeddings_and_output_weights
        weight: nn.Parameter = (
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        )
        return weight
