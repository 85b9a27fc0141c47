"""The blocks of an input, which are prepared one by one by any number of processes.

    .NAME.parts/plan.json    what the blocks are, and of what inputs and options
    .NAME.parts/000012/      a finished block: a dataset of its own

Blocks follow from inputs and options alone, so any processes that share this folder agree on them,
and what was finished before a kill is not done again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triptych.data.prepare.inputs.raw_sample import FileSegment
from triptych.data.prepare.inputs.readers import container_of
from triptych.errors import DataError

Block = tuple[FileSegment, ...]
PLAN = "plan.json"


def plan_blocks(
    folder: Path, inputs: Sequence[Path], options: Mapping[str, Any], block_size: int
) -> list[Block]:
    """The blocks of an input; planned once, and read by whoever comes later.

    Args:
        folder: is made.
        inputs: files.
        options: all else that the bytes of a block follow from.
        block_size: bytes of input in a block, about.

    Raises:
        DataError: a file is none that can be read, or the folder is of other inputs or options;
            names what differs, old and new.
    """
    for path in inputs:
        container_of(path)
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in inputs}
    identity = json.loads(json.dumps({"inputs": files, "block_size": block_size, **options}))
    file = folder / PLAN
    if file.exists():
        content = json.loads(file.read_text())
        _check(folder, content["identity"], identity)
        return [tuple(FileSegment(*segment) for segment in block) for block in content["blocks"]]
    blocks = _split(inputs, block_size)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{PLAN}.{os.getpid()}"
    unfinished.write_text(json.dumps({"identity": identity, "blocks": blocks}))
    unfinished.rename(file)
    return blocks


def _split(inputs: Sequence[Path], block_size: int) -> list[Block]:
    """Small files share a block, large ones have several."""
    blocks: list[Block] = []
    block: list[FileSegment] = []
    for path in inputs:
        for segment in container_of(path).split(path, block_size):
            if block and sum(s.size for s in block) + segment.size > block_size:
                blocks.append(tuple(block))
                block = []
            block.append(segment)
    return [*blocks, tuple(block)]


def _check(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differing = [
        f"{name}: {old.get(name)} then, {new.get(name)} now"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise DataError(
            f"{folder} was begun otherwise: {'; '.join(differing)}"
            "  -> type the former command to go on, or remove the folder to begin anew"
        )
