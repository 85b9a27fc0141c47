"""The files of counts: made once by one process, never stale, never half."""

import errno
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from triptych.configs.model_schema import VisionConfig
from triptych.configs.schema import Oversize
from triptych.data import make_once
from triptych.data.dataset import sizes as sizes_module
from triptych.data.dataset.dataset import Dataset
from triptych.data.dataset.sizes import open_sizes, sizes_of
from triptych.data.plan import passes as passes_module
from triptych.data.plan.order import Plan
from triptych.data.plan.passes import Passes, remember_in
from triptych.data.plan.plan_sources import PlanSource
from triptych.data.types import PixelLimits
from triptych.errors import DataError

NUM_SAMPLES = 10
IDENTITY = {"dataset": "a", "min_pixels": 1, "max_pixels": 2}


def count(start, end):
    tokens = np.arange(start, end, dtype=np.int64) + 1
    return tokens, 4 * tokens, tokens**2


def never(start, end):
    pytest.fail("counted again")


def columns(sizes):
    return [
        column.tolist() for column in (sizes.num_tokens, sizes.num_patches, sizes.num_patch_pairs)
    ]


EXPECTED = [column.tolist() for column in count(0, NUM_SAMPLES)]


def the_file(folder) -> Path:
    [file] = folder.glob("*.sizes")
    return file


@pytest.mark.parametrize("chunk", [3, 5, 100])
def test_counts_are_written_once_and_mapped(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sizes_module, "_CHUNK", chunk)
    first = open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])
    again = open_sizes(never, NUM_SAMPLES, IDENTITY, [tmp_path])
    assert columns(first) == columns(again) == EXPECTED
    assert first.summary == again.summary == sizes_of(*count(0, NUM_SAMPLES)).summary
    assert (first.summary.least_tokens, first.summary.most_tokens) == (1, 10)
    assert first.summary.most_patches == 40
    assert again.file == the_file(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        again.num_tokens[0] = 0


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes() + b"x"),
        lambda file: flip(file, file.read_bytes().index(b"most_tokens") + 14),
        lambda file: flip(file, 0),
    ],
)
def test_a_damaged_file_is_made_again(tmp_path, caplog, damage):
    open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])
    good = the_file(tmp_path).read_bytes()
    damage(the_file(tmp_path))
    assert columns(open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])) == EXPECTED
    assert the_file(tmp_path).read_bytes() == good
    assert "is damaged: it is made again" in caplog.text


def make_plan(sizes, **options) -> Plan:
    settings = {"seed": 0, "seq_len": 8, "max_patches": 400, "window": 4}
    source = PlanSource("a", 1.0, sizes)
    return Plan([source], **settings, oversize=Oversize.skip, **options)


def test_damaged_counts_are_refused_by_the_plan_that_hashes_them(tmp_path):
    open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])
    flip(the_file(tmp_path), sizes_module._HEADER_BYTES + 8 * NUM_SAMPLES)
    damaged = open_sizes(never, NUM_SAMPLES, IDENTITY, [tmp_path])
    with pytest.raises(DataError, match=r"source 'a': .*\.sizes is damaged, .* remove the file"):
        make_plan(damaged)


@pytest.mark.parametrize("size", [0, 4096, 50_000, 4095 + 24 * 5000])
def test_counts_that_are_cut_under_a_run_end_it_by_name(tmp_path, size):
    """No SIGBUS: before a pass, a window, or the work of a pack. Removed, they stay as they are."""
    sizes = open_sizes(count, 5000, IDENTITY, [tmp_path])
    source = PlanSource("a", 1.0, sizes)
    settings = {"seed": 0, "seq_len": 5000, "max_patches": 20_000, "window": 100}
    plan = Plan([source], **settings, oversize=Oversize.error)
    [pack] = plan.first_packs(1)
    file = the_file(tmp_path)
    content = file.read_bytes()
    os.truncate(file, size)
    cut = rf"\.sizes has {size} bytes of 124096: it was cut under this run  -> type the command"
    with pytest.raises(DataError, match=cut):
        plan.next_packs(plan.start, 200)
    with pytest.raises(DataError, match=cut):
        plan.workload(pack)
    with pytest.raises(DataError, match=cut):
        Plan([source], **settings, oversize=Oversize.error)
    file.write_bytes(content)
    file.unlink()
    assert len(plan.next_packs(plan.start, 200)[0]) == 200


def test_what_the_counts_follow_from_names_their_file(tmp_path):
    for changed in ({}, {"dataset": "b"}, {"max_pixels": 3}, {"patch_size": 16}):
        open_sizes(count, NUM_SAMPLES, IDENTITY | changed, [tmp_path])
    assert len(list(tmp_path.glob("*.sizes"))) == 4


def test_a_file_under_the_name_of_other_data_is_not_taken(tmp_path):
    """Were names to collide, or a person to rename: what the header says counts."""
    open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])
    file = the_file(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'"max_pixels": 2', b'"max_pixels": 3'))
    assert columns(open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])) == EXPECTED


def test_where_the_dataset_cannot_be_written_the_fallback_is_used(tmp_path, caplog):
    closed = tmp_path / "a_file_where_the_folder_should_be"
    closed.write_text("")
    folders = [closed, tmp_path / "run"]
    assert columns(open_sizes(count, NUM_SAMPLES, IDENTITY, folders)) == EXPECTED
    assert f"{closed}" in caplog.text
    again = open_sizes(never, NUM_SAMPLES, IDENTITY, folders)
    assert again.file == the_file(tmp_path / "run")
    in_memory = open_sizes(count, NUM_SAMPLES, IDENTITY, [closed])
    assert columns(in_memory) == EXPECTED
    assert in_memory.file is None
    assert in_memory.summary == again.summary


def count_and_tell(folder: Path, start: int, end: int):
    time.sleep(0.5)
    with (folder / "told").open("a") as told:
        told.write("counted\n")
    return count(start, end)


def open_when_all_are_there(folder: Path) -> list[list[int]]:
    dist.barrier()
    return columns(open_sizes(partial(count_and_tell, folder), NUM_SAMPLES, IDENTITY, [folder]))


@pytest.mark.distributed
def test_of_processes_that_start_together_one_counts(pool, tmp_path):
    assert pool(4).run(open_when_all_are_there, folder=tmp_path) == [EXPECTED] * 4
    assert (tmp_path / "told").read_text() == "counted\n"
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "told",
        the_file(tmp_path).name,
    }


def test_a_file_system_without_locks_costs_work_only(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(make_once.fcntl, "flock", no_locks)
    assert columns(open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])) == EXPECTED
    assert "No locks available" in caplog.text


def test_what_a_killed_process_left_is_removed(tmp_path):
    open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])
    file = the_file(tmp_path)
    leftover = file.with_name(f".{file.name}.partial-host-1")
    file.rename(leftover)
    open_sizes(count, NUM_SAMPLES, IDENTITY, [tmp_path])
    assert not leftover.exists()


def test_a_failed_count_leaves_nothing(tmp_path):
    def refuse(start, end):
        raise DataError("videos")

    with pytest.raises(DataError, match="videos"):
        open_sizes(refuse, NUM_SAMPLES, IDENTITY, [tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# -- of a dataset


LIMITS = PixelLimits(28 * 28, 168 * 168)


def test_limits_and_geometry_make_other_counts_of_a_dataset(digits, tmp_path):
    """Each is kept by itself; none meets those of another."""
    folder = shutil.copytree(digits / "captions", tmp_path / "captions")
    shutil.rmtree(folder / "sizes", ignore_errors=True)
    source = Dataset.open(folder, "captions")
    variants = [
        (LIMITS, VisionConfig()),
        (PixelLimits(28 * 28, 28 * 28), VisionConfig()),
        (LIMITS, VisionConfig(patch_size=8)),
        (LIMITS, VisionConfig(patch_size=20, spatial_merge_size=1)),
    ]
    first = [source.sizes(*variant).num_patches.tolist() for variant in variants]
    assert [source.sizes(*variant).num_patches.tolist() for variant in variants] == first
    assert first[0] != first[1] != first[2]
    assert len(list((folder / "sizes").glob("*.sizes"))) == 4
    source.verify()


# -- passes that a plan remembers


def test_a_pass_is_remembered_where_it_is_worth_it(tmp_path, monkeypatch):
    found = Passes("hash", [3], [None])
    remember = remember_in([tmp_path])
    assert remember("key", 9, lambda: found) == found
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(passes_module, "WORTH_REMEMBERING", 9)
    assert remember("key", 9, lambda: found) == found
    assert remember("key", 9, lambda: never(0, 0)) == found


def test_a_pass_in_which_any_bit_flipped_is_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(passes_module, "WORTH_REMEMBERING", 0)
    monkeypatch.setattr(make_once.os, "fsync", lambda _: None)
    found, remember = Passes("hash", [3], [None], [17]), remember_in([tmp_path])
    remember("key", 9, lambda: found)
    file = tmp_path / "key.passes.json"
    good = file.read_bytes()
    for at in range(len(good)):
        flip(file, at)
        assert remember("key", 9, lambda: found) == found
        assert file.read_bytes() == good
    assert caplog.text.count("is damaged: it is made again") == len(good)


def test_a_pass_under_the_name_of_another_plan_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(passes_module, "WORTH_REMEMBERING", 0)
    remember, other = remember_in([tmp_path]), Passes("other", [4], [None])
    remember("key", 9, lambda: Passes("hash", [3], [None]))
    (tmp_path / "key.passes.json").rename(tmp_path / "another.passes.json")
    assert remember("another", 9, lambda: other) == other


def test_a_pass_of_a_version_that_wrote_no_hash_is_made_again_without_a_word(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(passes_module, "WORTH_REMEMBERING", 0)
    former = {"hash": "hash", "num_fitting": [4], "misfits": [None], "num_tokens": []}
    (tmp_path / "key.plan.json").write_text(json.dumps(former))
    found = Passes("hash", [3], [None])
    assert remember_in([tmp_path])("key", 9, lambda: found) == found
    assert not caplog.text


def test_a_plan_that_remembers_is_the_same_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(passes_module, "WORTH_REMEMBERING", 0)
    sizes = sizes_of(*count(0, NUM_SAMPLES))
    plans = [make_plan(sizes)]
    plans += [make_plan(sizes, remember=remember_in([tmp_path])) for _ in range(2)]
    assert len({plan.hash for plan in plans}) == 1
    assert [plan.num_fitting for plan in plans] == [[8]] * 3
    assert plans[0].first_packs(5) == plans[2].first_packs(5)
    longer = sizes_of(*(column + 1 for column in count(0, NUM_SAMPLES)))
    assert make_plan(longer, remember=remember_in([tmp_path])).hash != plans[0].hash
