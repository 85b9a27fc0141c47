"""What `make demo` trains, in which layouts, how long, and what it must reach."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what evaluates waits for torch, which --help does not
    from triptych.launch.digits.evaluate import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """What the demo must reach: shares of pictures read exactly."""

    accuracy: float
    each: float
    """Least share of the pictures of one digit, and of those of two."""
    controls: float
    """Largest share that blank or swapped pictures may give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSizes:
    """The sizes of a demo."""

    num_images: int
    """Pictures for training, and as many close-ups."""
    num_samples: int | Mapping[str, int]
    """Samples of each dataset, or of each by its name."""
    budgets: tuple[int, int, int, int]
    """Tokens of the warm-up and of stages 1, 2 and 3."""
    num_read: int
    num_exported: int
    """Pictures that transformers reads, too."""
    bars: Bars


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One call of launch/pretrain.py."""

    name: str
    stage: str
    what: str
    token_budget: int
    overrides: str


FULL = DemoSizes(
    num_images=45_000,
    num_samples={
        "text": 9_000,
        "text_chat": 7_000,
        "classification": 44_000,
        "captions": 10_000,
        "strings": 62_000,
        "chat": 5_000,
        "heldout": 1_000,
    },
    budgets=(300_000, 480_000, 1_600_000, 200_000),
    num_read=400,
    num_exported=50,
    bars=Bars(accuracy=0.85, each=0.75, controls=0.15),
)
MINIATURE = DemoSizes(
    num_images=400,
    num_samples=400,
    budgets=(20_000, 20_000, 20_000, 20_000),
    num_read=40,
    num_exported=10,
    bars=Bars(accuracy=0.0, each=0.0, controls=1.0),
)


def runs_of(sizes: DemoSizes) -> list[Run]:
    """Warm-up and three stages, in three layouts. Learning rates were found by trial.

    Where the ViT trains, data parallelism takes least time on two cores: with pipeline stages the
    first waits for nobody and the second for it, and tensor parallelism sends all that it computes.
    """
    warmup, first, second, third = sizes.budgets
    return [
        Run(
            name="warmup",
            stage="warmup",
            what="a small language model learns phrases, and to copy, from text "
            "(TP=2, sequence parallel)",
            token_budget=warmup,
            overrides="parallel=tp2 train.micro_batch_size=4",
        ),
        Run(
            name="stage1",
            stage="1",
            what="the ViT learns single digits; the language model is frozen (DP=2)",
            token_budget=first,
            overrides="train.micro_batch_size=2 stage.vit.lr=1.5e-3 stage.adapter.lr=1.5e-3",
        ),
        Run(
            name="stage2",
            stage="2",
            what="everything learns strings of digits (DP=2, ZeRO-1)",
            token_budget=second,
            overrides="train.micro_batch_size=2",
        ),
        Run(
            name="stage3",
            stage="3",
            what="language model and adapter learn to answer; the ViT is frozen (PP=2)",
            token_budget=third,
            overrides="parallel=pp2 parallel.layout=[1,2] stage.adapter.lr=2e-4 stage.llm.lr=2e-4",
        ),
    ]


def below(bars: Bars, scores: "Scores") -> list[str]:
    """What does not reach the bars."""
    least = {"accuracy": bars.accuracy, "one_digit": bars.each, "two_digits": bars.each}
    problems = [
        f"{name}={getattr(scores, name):.3f} is below {bar}"
        for name, bar in least.items()
        if getattr(scores, name) < bar
    ]
    return problems + [
        f"{name}={getattr(scores, name):.3f} is above {bars.controls}: answers do not come "
        "from the picture"
        for name in ("blank", "swapped")
        if getattr(scores, name) > bars.controls
    ]
