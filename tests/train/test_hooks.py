"""What a run writes besides checkpoints, and when it stops itself: in every layout."""

import json
import re
import shutil
import struct
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from triptych.configs.compose import read_config
from triptych.configs.schema import Config
from triptych.costs.flops import Workload, forward_flops
from triptych.data.dataset.dataset import Dataset
from triptych.data.types import PixelLimits
from triptych.tests.helpers.damage import flip_bits
from triptych.tests.helpers.runs import (
    COVERING,
    LAYOUTS,
    STAGE2,
    Runs,
    losses,
    metrics,
    packs,
    train,
)
from triptych.train.hooks.ledger import trained_after
from triptych.train.json_lines import JsonLines, keep_until, read_lines

distributed = pytest.mark.distributed
every_layout = pytest.mark.parametrize(
    "layouts",
    [COVERING, pytest.param(tuple(LAYOUTS), marks=pytest.mark.slow)],
    ids=["covering", "all"],
)
PROGRESS = "triptych.train.hooks.progress.Progress.after_step"


def test_a_resumed_file_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    keep_until(path, 2)
    lines = JsonLines(path)
    lines.write({"step": 3, "again": True})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "harm",
    [
        b'{"stec": 2}\n',  # one flipped bit in a key
        b'\xfb"step": 2}\n',
        b'{"step": "2"}\n',
        b"[2]\n",
        b"\n",
    ],
)
def test_a_line_that_cannot_be_read_decides_nothing(harm, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + harm + b'{"step": 3}\n{"step": 4}\n')
    keep_until(path, 3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    assert path.with_suffix(".unreadable").read_bytes() == harm
    assert "metrics.jsonl: 1 of its lines cannot be read" in caplog.text
    assert [record["step"] for record in read_lines(path)] == [1, 3]


def test_a_record_that_cannot_be_replaced_decides_nothing(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    keep_until(tmp_path / "metrics.jsonl", 3)
    assert "stays as it is" in caplog.text


DAMAGED = (None, 5, "text", [5], {"packs": 5, "samples": "text"})


@pytest.mark.parametrize("value", DAMAGED, ids=str)
@pytest.mark.parametrize("key", ["packs", "samples", "passed_over"])
def test_a_damaged_ledger_keeps_no_run_from_going_back(key, value, tmp_path):
    """It says what it still says: here of steps 3 and 4, the latter damaged."""
    lines = JsonLines(tmp_path / "ledger" / "dp_00000.jsonl")
    before = {"packs": [1], "samples": [[0, 7]]}
    for step in (2, 3, 4):
        line = {"step": step, "packs": [step], "samples": [[0, step]], "passed_over": before}
        lines.write({**line, key: value} if step == 4 else line)
    lines.close()
    mesh = SimpleNamespace(dp_rank=0, dims=SimpleNamespace(dp=1))
    found = trained_after(2, tmp_path, mesh)
    assert found["packs"][:2] == [1, 3]
    assert found["samples"][:2] == [[0, 7], [0, 3]]
    assert (4 in found["packs"]) == (key != "packs")


@distributed
def test_metrics_and_ledger_agree(runs, digits):
    """Counts of the metrics, added up from the samples that the ledger names."""
    runs.train("run", "dp2", "train.num_steps=3")
    sources = [Dataset.open(digits / name, name) for name in STAGE2]
    found: Counter[int] = Counter()
    for ledger in (runs.dir("run") / "ledger").iterdir():
        for line in map(json.loads, ledger.read_text().splitlines()):
            for source, index in line["samples"]:
                found[line["step"]] += int(sources[source].sample(index).targets[1:].sum())
    assert [found[line["step"]] for line in metrics(runs.dir("run"))] == [
        line["num_supervised_tokens"] for line in metrics(runs.dir("run"))
    ]
    for line in metrics(runs.dir("run")):
        assert line["fill"] == line["num_tokens"] / (4 * 128)
        assert set(line["lr"]) == {"vit", "adapter", "llm"}


@distributed
def test_waiting_for_data_is_measured_apart(runs):
    """One rank's loader is late in step 2: it waits for the data, the other for it."""
    words = ("train.num_steps=3", "data.prefetch_steps=0")
    told, *_ = runs.call(train_on_slow_media, "run", "dp2", *words, rank=0)
    assert re.search(r" \| left [0-9hms ]+ \| data [0-9]+%", told)
    for line in metrics(runs.dir("run")):
        assert line["step_time_s"] == pytest.approx(line["data_s"] + line["compute_s"])
        assert (line["data_s"] >= SLOW_S) == (line["step"] == 2)
    runs.call(train_on_slow_media, "other", "dp2", *words, rank=1)
    assert metrics(runs.dir("other"))[1]["compute_s"] >= SLOW_S


SLOW_S = 1.0


def train_on_slow_media(config: Config, rank: int) -> str:
    """Train with a loader that is late in step 2 on one rank."""
    from triptych.data.loading.loader import Loader

    calls, next_step = Counter(), Loader.__next__

    def late(self):
        calls["next"] += 1
        if calls["next"] == 2 and dist.get_rank() == rank:
            time.sleep(SLOW_S)
        return next_step(self)

    with mock.patch.object(Loader, "__next__", late):
        return train(config)


@distributed
def test_flops_are_those_of_the_samples_in_any_layout(runs, digits):
    """From the dataset's own counts; padding to a multiple of tp adds none."""
    runs.train("dp2", "dp2", "train.num_steps=3")
    peak = "cluster.peak_tflops=0.01"
    runs.train("tp2 pp2", "tp2 pp2", "train.num_steps=3", peak)
    config = read_config(runs.dir("dp2") / "config.yaml")
    limits = PixelLimits.of(config.data)
    sources = [Dataset.open(digits / name, name) for name in STAGE2]
    sizes = [source.sizes(limits, config.model.vision) for source in sources]
    flops: Counter[int] = Counter()
    for ledger in (runs.dir("dp2") / "ledger").iterdir():
        for line in map(json.loads, ledger.read_text().splitlines()):
            for s, i in line["samples"]:
                length = int(sizes[s].num_tokens[i])
                load = Workload(
                    num_tokens=length,
                    token_pairs=length**2,
                    num_patches=int(sizes[s].num_patches[i]),
                    patch_pairs=int(sizes[s].num_patch_pairs[i]),
                    num_supervised_tokens=int(sources[s].sample(i).targets[1:].sum()),
                )
                flops[line["step"]] += 3 * forward_flops(config.model, load).total
    for name, ranks in {"dp2": 2, "tp2 pp2": 4}.items():
        for line in metrics(runs.dir(name)):
            assert line["flops"] == pytest.approx(flops[line["step"]])
            assert line["flops_per_s"] == pytest.approx(line["flops"] / line["step_time_s"])
            share = line["flops_per_s"] / (ranks * 0.01e12) if name == "tp2 pp2" else None
            assert line["mfu"] == pytest.approx(share)


@pytest.fixture(scope="module")
def damaged(digits, tmp_path_factory) -> Path:
    """The sample data with a flipped bit in every fifth picture."""
    root = tmp_path_factory.mktemp("damaged") / "sample_data"
    shutil.copytree(digits, root)
    for name in ("strings", "captions"):
        flip_bits(root / name, every=5)
    return root


@distributed
@every_layout
def test_unreadable_samples_are_left_out_on_every_rank(layouts, damaged, runs, pool, tmp_path):
    """The same in every layout: which samples, why, and the loss of the others."""
    runs.train("undamaged", "single", "train.num_steps=3")
    spoilt = Runs(pool, damaged, tmp_path)
    for layout in layouts:
        spoilt.train(layout, layout, "train.num_steps=3", "data.max_unreadable=1.0")
    wanted = quarantined(spoilt.dir("single"))
    assert wanted
    assert all("captions" in reason or "strings" in reason for *_, reason in wanted)
    sources = [Dataset.open(damaged / name, name) for name in STAGE2]
    left_out: Counter[int] = Counter()
    for step, source, index, *_ in wanted:
        left_out[step] += int(sources[source].sample(index).targets[1:].sum())
    for whole, rest in zip(
        metrics(runs.dir("undamaged")), metrics(spoilt.dir("single")), strict=True
    ):
        missing = whole["num_supervised_tokens"] - rest["num_supervised_tokens"]
        assert missing == left_out[whole["step"]]
    for layout in layouts:
        assert quarantined(spoilt.dir(layout)) == wanted
        told = {line["step"]: line["num_unreadable"] for line in metrics(spoilt.dir(layout))}
        assert told == {step: sum(row[0] == step for row in wanted) for step in told}
        assert losses(spoilt.dir(layout)) == pytest.approx(losses(spoilt.dir("single")), rel=1e-6)


@distributed
@pytest.mark.parametrize("then", [pytest.param("dp2", marks=pytest.mark.slow), "single"])
def test_a_killed_run_quarantines_every_sample_once(then, damaged, pool, tmp_path):
    """Also where fewer ranks go on: what the others wrote of the steps to come is cut, too."""
    runs = Runs(pool, damaged, tmp_path)
    options = ("train.num_steps=5", "run.checkpoint_every=2", "data.max_unreadable=1.0")
    runs.train("whole", "dp2", *options)
    runs.kill("killed", "dp2", *options, target=PROGRESS, call=5)
    runs.train("killed", then, *options)
    assert quarantined(runs.dir("killed")) == quarantined(runs.dir("whole"))


def quarantined(run_dir: Path) -> list[tuple[int | str, ...]]:
    """Step, source, index, name, shard, offset, cause and reason of each, sorted."""
    files = (run_dir / "quarantine").glob("dp_*.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines()]
    return sorted(tuple(json.loads(line).values()) for line in lines)


@distributed
@every_layout
def test_validation_loss_is_the_same_in_every_layout(layouts, runs):
    """On 5 packs, which come out even over no two ranks; the first step's rate is 0.

    So is that of each source, where packs have samples of both.
    """
    options = ("train.validate_every=1", "train.validation_packs=5", "data.validation.text=1.0")
    for layout in layouts:
        told = runs.train(layout, layout, "train.num_steps=1", *options)
        assert ", validation " in told
    steps = {layout: metrics(runs.dir(layout))[0] for layout in layouts}
    found = {
        layout: [step["validation_loss"], *step["validation_loss_by_source"].values()]
        for layout, step in steps.items()
    }
    one = found["single"]
    worst = max(
        abs(a / b - 1) for losses in found.values() for a, b in zip(losses, one, strict=True)
    )
    print(f"validation loss {one} in every layout, within {worst:.1e}")
    assert worst <= 1e-6
    assert steps["single"]["validation_loss_by_source"].keys() == {"heldout", "text"}
    assert min(one[1:]) < one[0] < max(one[1:])
    for name in ("samples_by_source", "tokens_by_source"):
        assert all(step[name] == steps["single"][name] for step in steps.values())
    assert sum(steps["single"]["tokens_by_source"].values()) == steps["single"]["num_tokens"]


@distributed
def test_validation_leaves_training_as_it_is(runs):
    runs.train("without", "tp2", "train.num_steps=4")
    runs.train("with", "tp2", "train.num_steps=4", "train.validate_every=2")
    validated = [line.get("validation_loss") for line in metrics(runs.dir("with"))]
    assert [loss is None for loss in validated] == [True, False, True, False]
    by_source = metrics(runs.dir("with"))[-1]["validation_loss_by_source"]
    assert by_source == pytest.approx({"heldout": validated[-1]}, rel=1e-12)
    assert losses(runs.dir("with")) == losses(runs.dir("without"))


@distributed
@pytest.mark.parametrize("layout", ["dp2", "tp2 pp2"])
def test_a_batch_without_supervised_tokens_is_skipped_by_all_ranks(layout, runs):
    """No update, no step of the optimizer; tokens are counted, training goes on."""
    runs.call(unsupervise, "run", layout, "train.num_steps=4", step=3)
    lines = metrics(runs.dir("run"))
    assert [line["loss"] is None for line in lines] == [False, False, True, False]
    assert lines[2]["num_supervised_tokens"] == 0
    assert [line["flops"] > 0 for line in lines] == [True, True, False, True]
    assert lines[2]["consumed_tokens"] == lines[1]["consumed_tokens"] + lines[2]["num_tokens"]
    numbers = runs.dir("run") / "checkpoints" / "step_000000004.0" / "data.json"
    assert json.loads(numbers.read_text())["num_updates"] == {"adapter": 3, "llm": 3, "vit": 3}
    assert list(packs(runs.dir("run"))) == [1, 2, 3, 4]


def unsupervise(config: Config, step: int) -> None:
    """Train with no supervised token in one step."""
    from triptych.data.loading.loader import Loader

    calls, next_step = Counter(), Loader.__next__

    def emptied(self):
        calls["next"] += 1
        found = next_step(self)
        for batch in found.microbatches if calls["next"] == step else ():
            batch.leave_out(0, len(batch.loss_mask))
        return found

    with mock.patch.object(Loader, "__next__", emptied):
        train(config)


@distributed
def test_tensorboard_has_what_the_metrics_have(runs):
    """A run that was killed at step 4, after a checkpoint of step 2, shows every step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("log=tensorboard", "train.num_steps=6", "run.checkpoint_every=2")
    runs.kill("run", "single", *options, target=PROGRESS, call=4)
    runs.train("run", "single", *options)
    events = EventAccumulator(str(runs.dir("run") / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in shown] == pytest.approx(losses(runs.dir("run")))
    assert {"grad_norm", "lr/vit", "lr/adapter", "lr/llm", "tokens_per_s", "fill"} <= set(
        events.Tags()["scalars"]
    )


@distributed
def test_wandb_offline_has_what_the_metrics_have(runs, tmp_path):
    """Nothing leaves the machine; a resumed run goes on under the same id."""
    options = ("log.wandb=true", "log.wandb_mode=offline", "log.wandb_project=other")
    runs.train("run", "single", *options, "train.num_steps=2")
    named = ("log.wandb_name=mine", "log.wandb_group=ablation", "log.wandb_tags=[vit,wide]")
    runs.train("run", "single", *options, *named, "train.num_steps=4")
    disabled = ("log.wandb=true", "log.wandb_mode=disabled", "train.num_steps=5")
    runs.train("run", "single", *disabled)
    logs = sorted((runs.dir("run") / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({log.name for log in logs}) == 1
    assert len(logs) == 2
    records = [wandb_records(log) for log in logs]
    shown = wandb_history(records[0]) | wandb_history(records[1])
    assert [shown[step]["loss"] for step in sorted(shown)] == losses(runs.dir("run"))[:4]
    assert {"grad_norm", "lr/vit", "tokens_per_s"} <= set(shown[1])
    told = [record.run for found in records for record in found if record.HasField("run")]
    assert [run.project for run in told] == ["other", "other"]
    assert [run.display_name for run in told] == [str(runs.dir("run"))[-128:], "mine"]
    assert [run.run_group for run in told] == ["", "ablation"]
    assert [list(run.tags) for run in told] == [[], ["vit", "wide"]]


def wandb_records(log: Path) -> list:
    """The records of an offline log: protocol buffers in LevelDB's log format.

    After 7 bytes come blocks of 32 KiB of fragments: checksum, length, kind, content. Kind 1 is a
    whole record, 2 its first, 3 a middle and 4 its last fragment.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, records, data, place = log.read_bytes(), [], b"", 7
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little is left of the block for a fragment
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        fragment = content[place + 7 : place + 7 + length]
        data = fragment if kind in (1, 2) else data + fragment
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(data))
    return records


def wandb_history(records: list) -> dict[int, dict]:
    """Step -> what was logged."""
    shown = {}
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
            shown[record.history.step.num] = {
                key: json.loads(item.value_json) for key, item in items.items()
            }
    return shown
