"""A stage: what trains, for how many tokens, how fast."""

import math
from collections.abc import Mapping

from torch import nn

from triptych.configs.schema import Config, Decay, Horizon, Part, PartConfig
from triptych.models.parameters import part_of


class Stage:
    """One stage of the recipe, as configs/stage/ describes it."""

    def __init__(self, config: Config) -> None:
        stage, train = config.stage, config.train
        self.name = stage.name
        self.token_budget = stage.token_budget
        self.tokens_per_step = train.global_batch_size * train.seq_len
        """At most: where every pack is full."""
        self._num_steps, self._horizon = train.num_steps, stage.horizon
        self.parts: dict[Part, PartConfig] = {
            Part.VIT: stage.vit,
            Part.ADAPTER: stage.adapter,
            Part.LLM: stage.llm,
        }

    @property
    def trained_parts(self) -> frozenset[Part]:
        """The parts that train."""
        return frozenset(part for part, config in self.parts.items() if config.train)

    def freeze(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set ``requires_grad`` of every parameter, by its global name.

        Before the optimizer is built.
        """
        for name, parameter in parameters.items():
            parameter.requires_grad_(part_of(name) in self.trained_parts)

    def is_finished(self, consumed_tokens: int) -> bool:
        """Whether the token budget is used up."""
        return consumed_tokens >= self.token_budget

    def learning_rates(self, consumed_tokens: int, step: int) -> dict[str, float]:
        """Learning rate of each part ("vit", "adapter", "llm") after so many tokens and steps.

        0 for what is frozen.
        """
        progress = consumed_tokens / self.token_budget
        share = self.tokens_per_step / self.token_budget
        if self._horizon is Horizon.run and self._num_steps is not None:
            progress = max(progress, step / self._num_steps)
            share = max(share, 1 / self._num_steps)
        progress = min(1.0, progress)
        return {
            part.value: learning_rate(config, progress, share) if config.train else 0.0
            for part, config in self.parts.items()
        }

    def cut_short(self) -> str:
        """Where a cap ends a schedule that follows the budget; empty where it is gone through."""
        most = (self._num_steps or 0) * self.tokens_per_step
        if self._num_steps is None or self._horizon is Horizon.run or most >= self.token_budget:
            return ""
        share, last = most / self.token_budget, self._num_steps - 1
        rates = self.learning_rates(last * self.tokens_per_step, last)
        ends = [
            f"{part.value} at {rates[part.value]:.1e}"
            + (" in warm-up" if share <= config.warmup else f" of {config.lr:.1e}")
            for part, config in self.parts.items()
            if config.train
        ]
        return (
            f"learning rates: train.num_steps={self._num_steps} ends them at {share:.2g} of the "
            f"budget that they follow: {', '.join(ends)}\n"
            f"  -> stage.horizon=run or stage.token_budget={most} goes through all of them"
        )


def learning_rate(config: PartConfig, progress: float, step: float) -> float:
    """Linear warm-up, then decay to ``min_lr``.

    Args:
        config: of the part.
        progress: share of the horizon that is used up before this step.
        step: share that a step uses up; the first step warms up by as much.
    """
    if progress < config.warmup:
        return config.lr * min(1.0, (progress + step) / config.warmup)
    left = (1.0 - progress) / (1.0 - config.warmup) if config.warmup < 1 else 0.0
    if config.decay is Decay.constant:
        return config.lr
    if config.decay is Decay.linear:
        return config.min_lr + (config.lr - config.min_lr) * left
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (
        1.0 + math.cos(math.pi * (1 - left))
    )
