"""What the benchmarks against transformers compare is the same step: the arms agree in the loss."""

from dataclasses import replace

import pytest
import torch

from triptych.benchmarks import gpu, speed
from triptych.benchmarks.arms import build_arms, build_both
from triptych.benchmarks.samples import draw_samples, first_fit
from triptych.configs.schema import Precision
from triptych.tests.helpers.single import alone

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures a CPU")

SMALL = replace(
    speed.MODEL,
    vision=replace(speed.MODEL.vision, depth=1),
    language=replace(speed.MODEL.language, num_layers=1),
)
MIX = replace(speed.MIX, num_samples=4)


def test_all_arms_agree():
    config = speed.run_of(SMALL)
    samples = draw_samples(MIX, SMALL, seed=3)
    with alone() as mesh:
        engine, model = build_both(config, mesh)
        arms = build_arms(engine, model, config, samples, rows=2)
        flops = speed.check(arms)
        assert len(arms) == len(flops) == 4
        assert min(flops.values()) == flops["ours"], "padding, and logits that nobody needs"
        wrong = dict(arms, wrong=lambda: arms["ours"]() * (1 + 2 * speed.SAME_LOSS))
        with pytest.raises(SystemExit, match="disagree in the loss"):
            speed.check(wrong)


def test_the_comparison_for_a_gpu_runs_to_its_end(capsys):
    """In bf16 on a CPU: all but the bars and the peak memory."""
    config = speed.run_of(SMALL)
    config.train.precision = Precision.bf16
    with alone() as mesh:
        rows = gpu.compare(config, MIX, mesh, num_rounds=1, rows=2)
    assert [row.claim.split(" of ")[0].split(",")[0] for row in rows] == [
        "model FLOPs",
        "tokens / s",
        "tokens / s",
        "peak memory",
    ]
    assert "between the arms" in capsys.readouterr().out


@pytest.mark.parametrize("fastest", ["transformers, padded", "transformers, packed"])
def test_every_bar_has_a_row_whichever_arm_is_the_fastest(fastest):
    seconds = {"ours": 1.0, "transformers, padded": 2.0, "transformers, packed": 2.0}
    rows = gpu.report([(1e12, seconds | {fastest: 1.5})], tokens=100, flops=1e9)
    assert [row.claim.removeprefix("tokens / s, ours over ") for row in rows[1:]] == [
        f"the fastest other, {fastest}",
        "transformers, padded",
    ]
    assert rows[1].figure.startswith("1.50")


def test_packs_hold_every_sample_once():
    samples = draw_samples(speed.MIX, SMALL)
    packs = first_fit(samples, speed.PACK_TOKENS)
    assert sorted(s.sample_id for pack in packs for s in pack) == [s.sample_id for s in samples]
    assert all(sum(len(s.input_ids) for s in pack) <= speed.PACK_TOKENS for pack in packs)
