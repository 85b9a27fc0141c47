"""What a rank writes of a hang: its Python stacks, and what torch's flight recorder has.

stacks/20261129_001502_step_17/rank_00003.txt     stacks of all threads
stacks/20261129_001502_step_17/collectives_3      the last 2,000 collectives, for torchfrtrace
"""

import faulthandler
import os
from pathlib import Path
from typing import Any

import torch._C._distributed_c10d as c10d

STACKS = "stacks"
"""The folder in ``run.dir``."""
TRACE = "collectives_"
"""``torchfrtrace FOLDER -p collectives_`` reads these, and says which rank lacks what."""


def write_stacks(folder: Path, rank: int, heading: str) -> None:
    """Write both.

    Raises:
        OSError: the disk does not take them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank_{rank:05d}.txt").open("w") as file:
        file.write(f"{heading}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        os.fsync(file.fileno())
    names: Any = c10d
    dump = getattr(names, "_dump_nccl_trace", names._dump_fr_trace)
    (folder / f"{TRACE}{rank}").write_bytes(dump())
