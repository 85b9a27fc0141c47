"""The likeliest next token, by a vocabulary-parallel head: no logits but those of last tokens.

S segments, V entries of the vocabulary on this tensor-parallel rank, H width of the language model.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


class NextToken(nn.Module):
    """A module, as ``SummedLoss`` is: what gathers parameters before their use hooks onto these."""

    def __init__(
        self, weight_VH: nn.Parameter, tp_group: dist.ProcessGroup, *, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.weight = weight_VH
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel

    def forward(self, hidden_T1H: Tensor, last_S: Tensor) -> Tensor:
        """Choose. Every rank of ``tp_group`` must call this.

        Args:
            hidden_T1H: (T, 1, H), or (T / tp, 1, H) of this rank with sequence parallelism.
            last_S: (S,) int, the positions that are to be followed.

        Returns:
            (S,) int64, of the whole vocabulary, the same on every rank; of equals the first.
        """
        if self.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, group=self.tp_group)
        logits_SV = hidden_T1H.squeeze(1).index_select(0, last_S) @ self.weight.T
        best_S, ids_S = logits_SV.max(dim=1)
        ids_S += self.tp_group.rank() * logits_SV.size(1)
        if self.tp_group.size() == 1:
            return ids_S
        own = torch.stack([best_S.double(), ids_S.double()])  # exact: ids are below 2**53
        gathered = own.new_empty(self.tp_group.size() * 2, len(last_S))
        dist.all_gather_into_tensor(gathered, own, group=self.tp_group)
        best_RS, ids_RS = gathered.view(-1, 2, len(last_S)).unbind(1)
        return ids_RS.gather(0, best_RS.argmax(0, keepdim=True)).squeeze(0).long()
