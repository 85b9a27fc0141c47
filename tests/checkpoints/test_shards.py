"""Each rank saves its own part and no more; any layout and either kind of ZeRO reads it."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from triptych.checkpoints.boxes import Box, boxes_of_range, split_range
from triptych.checkpoints.layout import CheckpointFolder, ShardFiles
from triptych.checkpoints.run_state import load_optimizer, load_weights, pieces_to_save
from triptych.checkpoints.shard_file import Snapshot
from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.models.init import init_parameters
from triptych.parallel.mesh import build_mesh, init_distributed
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.plain_shards import whole_tensors
from triptych.tests.helpers.runs import LAYOUTS, Runs
from triptych.train.engine import Engine, build_engine

slow = pytest.mark.slow
ZEROS = ("megatron", "deepspeed")


# --- arithmetic


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("height", [1, 2, 4])
def test_the_boxes_of_a_range_are_its_elements_in_order(height, width):
    whole = torch.arange(1000).view(20, 50)
    block = Box(3, 7, height, width)
    flat = whole[3 : 3 + height, 7 : 7 + width].flatten()
    for start in range(block.numel):
        for end in range(start, block.numel + 1):
            boxes = list(boxes_of_range(block, start, end))
            assert len(boxes) <= 3
            cut = [whole[b.row :, b.column :][: b.num_rows, : b.num_columns] for b in boxes]
            found = torch.cat([flat[:0], *(values.flatten() for values in cut)])
            assert torch.equal(found, flat[start:end])


def test_an_overlap_is_what_lies_in_both():
    boxes = [Box(r, c, h, w) for r in (0, 2) for c in (0, 1) for h in (1, 3) for w in (1, 2)]
    for one in boxes:
        for other in boxes:
            common = one.overlap(other)
            assert cells(one) & cells(other) == (cells(common) if common else set())


def cells(box: Box) -> set[tuple[int, int]]:
    rows = range(box.row, box.row + box.num_rows)
    return {(r, c) for r in rows for c in range(box.column, box.column + box.num_columns)}


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 40])
def test_parts_are_equal_and_cover_everything_once(num_parts):
    sizes = [5, 1, 0, 16, 3]
    parts = [split_range(sizes, part, num_parts) for part in range(num_parts)]
    seen = Counter((i, e) for part in parts for i, r in enumerate(part) for e in range(*r))
    assert seen == Counter({(i, e): 1 for i, size in enumerate(sizes) for e in range(size)})
    lengths = [sum(end - start for start, end in part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


# --- any layout reads what any other has written


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "zero"),
    [("tp2 pp2", "megatron"), ("dp2", "deepspeed")]
    + [pytest.param("dp2 pp2 interleaved", zero, marks=slow) for zero in ZEROS],
)
def test_any_layout_and_zero_read_the_same_bits(first, zero, runs):
    runs.train("run", first, f"optimizer.zero={zero}", "train.num_steps=2")
    folder = runs.dir("run") / "checkpoints" / "step_000000002.0"
    want = whole_tensors(folder / "shards")
    assert {key.split(".")[0] for key in want} == {"model", "master", "exp_avg", "exp_avg_sq"}
    targets = [("dp2 pp2 interleaved", ZEROS[0]), ("tp2", ZEROS[1])]
    if first not in ("tp2 pp2", "dp2"):
        targets = [(layout, zero) for layout in LAYOUTS for zero in ZEROS]
    for number, (layout, other) in enumerate(targets):
        copy = runs.dir(f"copy{number}")
        copy.mkdir()
        words = ("optimizer.zero=" + other,)
        runs.call(load_and_save, "run", layout, *words, folder=folder, copy=copy)
        got = whole_tensors(copy)
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert torch.equal(tensor.view(torch.int32), got[key].view(torch.int32)), key


def engine_of(config: Config) -> Engine:
    init_distributed(HANG_S)
    parallel = config.parallel
    mesh = build_mesh(parallel.tp, parallel.pp, vpp=parallel.vpp, seed=0, timeout_s=HANG_S)
    return build_engine(config, mesh)


def load_and_save(config: Config, folder: Path, copy: Path) -> None:
    engine = engine_of(config)
    load_weights(folder, engine.tensors)
    load_optimizer(folder, engine.tensors, partly=False)
    snapshot = Snapshot()
    snapshot.take(pieces_to_save(engine.tensors), engine.mesh, engine.sharding)
    snapshot.write(copy, engine.mesh.rank)


@pytest.mark.distributed
def test_what_is_missing_is_told(runs):
    """The shards of a rank that is not there, as in a folder put together of two."""
    runs.train("run", "dp2", "train.num_steps=1")
    folder = CheckpointFolder(runs.dir("run") / "checkpoints" / "step_000000001.0")
    ShardFiles(folder.shards, 1).index.write_text("{}")
    message = runs.call(message_of_loading, "run", "single", folder=folder.path)[0]
    assert re.search(r"shards holds \d+ of \d+ elements of model\.\S+ that this rank", message)


def message_of_loading(config: Config, folder: Path) -> str:
    engine = engine_of(config)
    try:
        load_weights(folder, engine.tensors)
    except Exception as error:
        return str(error)
    return ""


# --- memory

BUCKET_BYTES = 1 << 24
WIDE = ("model.language.intermediate_size=8192",)
"""Ten million parameters: the part of each of four ranks is more than a bucket."""


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks")
def test_a_save_takes_no_more_memory_than_the_ranks_part(pool, digits, tmp_path):
    """4 dp ranks. Measured: 37.5 MiB for a part of 37.5; a gathered state would be 112."""
    words = Runs(pool, digits, tmp_path).words("run", "single", *WIDE)
    found = pool(4).run(memory_of_a_save, config=load_config(words))
    for part, taken, parameters in found:
        print(f"part {part / 2**20:.1f} MiB, taken {taken / 2**20:.1f} MiB")
        assert part == pytest.approx(16 * parameters / 4, rel=0.01)
        assert part > 2 * BUCKET_BYTES
        assert taken <= part + BUCKET_BYTES


def memory_of_a_save(config: Config) -> tuple[int, int, int]:
    """Bytes of this rank's part, bytes that a save took at most, parameters of the model."""
    folder = Path(config.run.dir)
    folder.mkdir(exist_ok=True)
    engine = engine_of(config)
    init_parameters(engine.bare_chunks, engine.sharding, engine.mesh, config.seed)
    engine.optimizer.refresh_master_weights()
    with torch.no_grad():
        engine.optimizer.state_shards()  # the moments are there from the first update on
        snapshot = Snapshot()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        snapshot.take(pieces_to_save(engine.tensors), engine.mesh, engine.sharding)
        snapshot.write(folder, engine.mesh.rank)
    numel = sum(parameter.numel() for parameter in engine.parameters.values())
    return snapshot.num_bytes, memory("VmHWM") - before, numel


def memory(line: str) -> int:
    """Bytes of this process, by a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{line}:\s+(\d+) kB", status)[1])
