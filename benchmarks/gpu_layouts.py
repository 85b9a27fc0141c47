"""Every layout that fits these GPUs against one process on a CPU: losses, gradients, three updates.

    torchrun --nproc-per-node gpu benchmarks/gpu_layouts.py               # or --miniature

The small model and the packs of tests/helpers/layouts.py, with the kernels that a run would take.
All GPUs take part: those that tp and pp leave over are replicas.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from triptych.benchmarks.table import Row, finish
from triptych.parallel.agree import Ranks
from triptych.parallel.mesh import build_mesh, init_distributed, shutdown
from triptych.tests.helpers.layouts import (
    KINDS,
    LAYOUTS,
    NUM_PACKS,
    Layout,
    LayoutCase,
    LayoutDistance,
    LayoutOutcome,
    RankOutcome,
    distance,
    join,
    measure,
)

COMMAND = "torchrun --nproc-per-node gpu benchmarks/gpu_layouts.py"
BAR = LayoutDistance(loss=2e-6, norm=2e-6, grads=2e-5, parameters=1e-2)
"""In fp32, as between layouts on a CPU; updates after three clipped steps, in learning rates."""
BF16_BAND = 3.0
"""In bf16: of the distance to fp32 that one process in bf16 on a CPU has."""
NUM_STEPS = 3
TIMEOUT_S = 600
ALONE = Layout()


def layouts_of(world_size: int) -> list[Layout]:
    """Each way to split the model, once, with as many replicas as there are ranks for."""
    found = set()
    for layout in LAYOUTS:
        dp, left = divmod(world_size, layout.tp * layout.pp)
        groups = layout.pp if layout.vpp > 1 else 1
        if not left and NUM_PACKS % (dp * groups) == 0:
            found.add(replace(layout, dp=dp))
    return sorted(found)


def cases_of(layout: Layout, *, miniature: bool) -> list[LayoutCase]:
    """What changes the way of a number: overlap, recomputation, optimizer, precision.

    In miniature with as few microbatches as a pipeline can have.
    """
    packs = NUM_PACKS // (layout.dp * layout.pp) if miniature else 1
    recomputed = {"vit": "full", "llm": "core_attn+mlp"}
    cases = [
        LayoutCase(layout),
        LayoutCase(layout, tied=True, zero="megatron+all", **recomputed),
        LayoutCase(layout, "stage3", zero="deepspeed"),
        LayoutCase(layout, precision="bf16"),
    ]
    return [replace(case, micro_batch_size=packs) for case in cases]


def plain(case: LayoutCase) -> LayoutCase:
    """The same model in one process, without overlap or recomputation."""
    return LayoutCase(ALONE, case.stage, case.tied, precision=case.precision)


def reference(file: Path) -> dict[LayoutCase, LayoutOutcome]:
    """What one process gives on a CPU, for every plain case; in a process that sees no GPU."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    subprocess.run(
        [sys.executable, __file__, "--reference", str(file)],
        env=env | {"CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    found: dict[LayoutCase, LayoutOutcome] = pickle.loads(file.read_bytes())
    return found


def write_reference(file: Path) -> None:
    """Measure the plain cases in this process."""
    init_distributed(TIMEOUT_S)
    cases = list(dict.fromkeys(map(plain, cases_of(ALONE, miniature=False))))
    outcomes = measure(ALONE, cases, NUM_STEPS, KINDS)
    found = {case: join([one], case) for case, one in zip(cases, outcomes, strict=True)}
    file.write_bytes(pickle.dumps(found))
    shutdown()


def on_cpu(outcome: RankOutcome) -> RankOutcome:
    """To travel, and to be compared."""

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    grads = {kind: moved(tensors) for kind, tensors in outcome.grads.items()}
    return replace(outcome, grads=grads, parameters=moved(outcome.parameters))


def measured(ranks: Ranks, *, miniature: bool) -> Iterator[tuple[LayoutCase, list[RankOutcome]]]:
    """Every case, with what each rank has of it. Every rank must call this."""
    for layout in layouts_of(ranks.world_size):
        cases = cases_of(layout, miniature=miniature)
        with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed's log belongs
            outcomes = measure(layout, cases, NUM_STEPS)
        for case, outcome in zip(cases, outcomes, strict=True):
            yield case, ranks.all_gather(on_cpu(outcome))


def compare(
    case: LayoutCase, got: LayoutOutcome, references: dict[LayoutCase, LayoutOutcome]
) -> tuple[LayoutDistance, LayoutDistance]:
    """How far it is from fp32 on a CPU, and how far it may be."""
    want = references[plain(replace(case, precision="fp32"))]
    if case.precision == "fp32":
        return distance(got, want), BAR
    error = distance(references[plain(case)], want)
    kinds = ("loss", "norm", "grads", "parameters")
    return distance(got, want), replace(error, **{k: BF16_BAND * getattr(error, k) for k in kinds})


def rows_of(shares: dict[LayoutCase, float]) -> list[Row]:
    """A row for each precision, from each case's share of its bar."""
    rows = []
    for precision in dict.fromkeys(case.precision for case in shares):
        own = {case: share for case, share in shares.items() if case.precision == precision}
        worst = max(own, key=lambda case: own[case])
        claim = f"{precision} on CUDA against the CPU, {len(own)} cases"
        figure = f"worst {own[worst]:.2f}: {worst}"
        rows.append(Row(claim, figure, "<= 1 of the bar", own[worst] <= 1, COMMAND))
    return rows


def main(*, miniature: bool) -> list[Row]:
    """Compare, and print Markdown on rank 0; returns its rows, there."""
    init_distributed(TIMEOUT_S)
    ranks = build_mesh(1, 1, seed=0, timeout_s=TIMEOUT_S).world
    is_main = ranks.rank == 0
    with tempfile.TemporaryDirectory() as folder:
        references = reference(Path(folder) / "reference.pickle") if is_main else {}
    ranks.all_gather(None)  # the others wait here, while rank 0 computes on its CPU
    if is_main:
        print(
            f"On {ranks.world_size} ranks. Distance from fp32 in one process on the CPU: loss and "
            "norm relative, gradients of the largest element, updates in learning rates. Bar in "
            f"fp32: {BAR.loss:g}, {BAR.norm:g}, {BAR.grads:g} and {BAR.parameters:g}; in bf16 "
            f"{BF16_BAND:g} times what one process has on the CPU.\n\n"
            "| case | loss | norm | gradients | updates | of the bar |\n|---|---|---|---|---|---|"
        )
    shares = {}
    for case, pieces in measured(ranks, miniature=miniature):
        if is_main:
            far, bar = compare(case, join(pieces, case), references)
            shares[case] = far.times(bar)
            numbers = (far.loss, far.norm, far.grads, far.parameters)
            cells = " | ".join(f"{number:.1e}" for number in numbers)
            print(f"| {case} | {cells} | {shares[case]:.2f} |", flush=True)
    shutdown()
    return rows_of(shares)


if __name__ == "__main__":
    if "--reference" in sys.argv:
        write_reference(Path(sys.argv[-1]))
    elif rows := main(miniature="--miniature" in sys.argv):
        finish(rows)
