"""Degrees of parallelism, as numbers only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dims:
    """How many ranks each axis has.

    Ranks are ordered tp (fastest), dp, pp, as megatron-core orders them.
    """

    tp: int
    pp: int
    dp: int

    @classmethod
    def of(cls, world_size: int, tp: int, pp: int) -> "Dims":
        """The data-parallel degree is what is left of ``world_size`` (validated before)."""
        assert world_size % (tp * pp) == 0, f"{world_size=} is no multiple of {tp=} * {pp=}"
        return cls(tp=tp, pp=pp, dp=world_size // (tp * pp))

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp} dp={self.dp}"
