"""The one command for GPUs: its page, its verdicts, and all of it on a pretended device."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triptych.benchmarks import gpu_check, gpu_kernels, gpu_layouts
from triptych.benchmarks.gpu_check import Launchers, Section
from triptych.configs.compose import load_config
from triptych.models.kernels import Installed, Kernel
from triptych.tests.helpers.layouts import grid
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.pretend_cuda import pretended_cuda
from triptych.tests.helpers.pretend_registration import why_impossible
from triptych.tests.helpers.single import alone

STAND_IN = """
import signal, sys
kind = sys.argv[1].split("/")[1].removesuffix(".py")
print(kind, "prints", *sys.argv[2:], flush=True)
if kind == "not_met":
    print("| claim | 1.0 | >= 2 | NOT MET | `command` |")
    sys.exit(1)
if kind == "fails":
    sys.exit("rank 3 says why")
if kind == "hangs":
    signal.pause()
"""


@pytest.fixture
def launchers(tmp_path: Path) -> Launchers:
    """Of a script that does what its name says."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return Launchers([sys.executable, str(script)], [sys.executable, str(script)])


def test_a_section_that_fails_says_why_and_the_others_go_on(tmp_path, launchers, capsys):
    sections = [
        Section("First", "holds", words=["model=small"]),
        Section("Second", "fails", on_all_ranks=True),
        Section("Third", "not_met"),
        Section("Fourth", "values", fence="yaml"),
    ]
    assert not gpu_check.check(sections, launchers, tmp_path / "found")
    page = (tmp_path / "found" / "page.md").read_text()
    verdicts = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| F")]
    assert verdicts == [["| First", "met"], ["| Fourth", "met"]]
    assert "| Second | failed, exit code 1 |" in page
    assert "| Third | NOT MET |" in page
    assert "### Second\n\nfails prints\n\n    rank 3 says why" in page
    assert "```yaml\nvalues prints\n```" in page
    assert "holds prints model=small" in capsys.readouterr().out


def test_what_is_measured_is_said_once_and_may_be_another():
    measured = gpu_check.sections(["train.seq_len=4096", "model=qwen2_vl_7b"], miniature=False)[3:]
    assert [section.name for section in measured] == ["gpu", "calibrate"]
    for section in measured:
        config = load_config(section.words)
        assert (config.model.name, config.train.seq_len) == ("qwen2_vl_7b", 4096)
    assert load_config(gpu_check.with_defaults([])).model.name == "qwen2_vl_2b"


def test_all_bars_met(tmp_path, launchers):
    sections = [Section("First", "holds"), Section("Second", "values")]
    assert gpu_check.check(sections, launchers, tmp_path)


def test_a_section_that_hangs_is_stopped(tmp_path, launchers, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT_S", 0)
    found = gpu_check.run_section(Section("First", "hangs"), launchers, tmp_path)
    assert (found.verdict, found.met) == ("failed, exit code -15", False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 16, 32])
def test_every_split_that_fits_is_compared_with_all_ranks(world_size):
    layouts = gpu_layouts.layouts_of(world_size)
    splits = [replace(layout, dp=1) for layout in layouts]
    assert len(set(splits)) == len(layouts) > 0
    for layout in layouts:
        assert layout.world_size == world_size
        for miniature in (False, True):
            cases = gpu_layouts.cases_of(layout, miniature=miniature)
            plain = {replace(case, micro_batch_size=1, precision="fp32") for case in cases}
            assert plain <= set(grid(layout))


HERE = Installed(cuda=True, modules=frozenset({"torch.nn.attention.varlen"}), compiles=False)


def kernels_on_the_device(device: torch.device) -> list[bool]:
    """Whether each bar is met: LayerNorm, the decoder's attention, one of values 10 % too large."""
    [layer_norm] = [one for one in gpu_kernels.norms(HERE) if one.what == "LayerNorm"]
    found = [gpu_kernels.report(layer_norm, device).met]
    for one in gpu_kernels.attentions(HERE, device):
        if one.kernel is Kernel.TORCH_VARLEN and one.what == "attention, decoder":
            wrong = replace(one, function=lambda q, k, v, f=one.function: f(q, k, 1.1 * v))
            found += [gpu_kernels.report(case, device).met for case in (one, wrong)]
    return found


def kernels_on_a_pretended_device() -> list[bool]:
    with pretended_cuda():
        return kernels_on_the_device(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.distributed
def test_a_kernel_is_compared_with_a_cpu(pretended_pool):
    assert pretended_pool(1).run(kernels_on_a_pretended_device) == [[True, True, False]]


def test_a_kernel_that_cannot_run_is_told(capsys):
    """torch's varlen attention has no CPU kernel."""
    with alone():
        device = torch.device("cpu")
        [row, _] = [
            gpu_kernels.report(one, device)
            for one in gpu_kernels.attentions(HERE, device)
            if one.kernel is Kernel.TORCH_VARLEN
        ]
    assert not row.met
    assert row.figure.startswith("failed: NotImplementedError: ")


@pytest.mark.slow
@pytest.mark.skipif(bool(why_impossible()), reason=str(why_impossible()))
def test_all_of_it_runs_on_a_pretended_device(tmp_path, monkeypatch):
    """To its end: speed, memory and what they are held against exist on a real one only."""
    monkeypatch.setattr(gpu_check, "LIMIT_S", HANG_S)
    pretended = ["-m", "triptych.tests.helpers.pretend_cuda"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launchers = Launchers(
        [sys.executable, *pretended], [*torchrun, "--nproc-per-node=1", *pretended]
    )
    sections = gpu_check.sections([], miniature=True)
    gpu_check.check(sections, launchers, tmp_path)
    page = (tmp_path / "page.md").read_text()
    verdicts = dict(line.split(" | ")[:2] for line in page.splitlines()[4:9])
    assert verdicts.pop("| Calibration")  # on a busy machine, differences of times drown in noise
    assert verdicts == {
        "| Machine": "met",
        "| Kernels": "met",
        "| Layouts": "met",
        "| Throughput and memory": "NOT MET",
    }
    assert "| GPUs | 8 x pretended H100" in page
    assert "| tp1 pp1 dp1 stage2 " in page
    assert "model FLOPs of ours, share of the GEMM rate" in page
