"""The datasets of a run: opened, checked against tokenizer and model, and planned."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from triptych.configs.schema import Config, DataConfig
from triptych.data.dataset import Dataset
from triptych.data.loader import Loader
from triptych.data.plan.plan import Cursor, Plan
from triptych.data.plan.sources import plan_sources
from triptych.data.tokenizer import load_tokenizer
from triptych.data.types import Batch, Limits
from triptych.parallel.mesh import Mesh
from triptych.train.report import say


@dataclass(frozen=True, slots=True)
class DataPlan:
    """The sources of the stage's mixture, in the order that the plan numbers them, and those of validation."""

    sources: list[Dataset]
    plan: Plan
    weights: Mapping[str, float]
    validation_sources: list[Dataset]
    validation_plan: Plan | None

    def describe(self) -> str:
        """Sources with weight and number of samples, for the terminal."""
        listed = ", ".join(
            f"{source.name} {self.weights[source.name]:g} ({len(source):,} samples)"
            for source in self.sources
        )
        return f"{listed}; plan {self.plan.hash[:12]}"
