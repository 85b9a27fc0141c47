"""What ranks that fail leave for the next start to find: ``failures/rank_00003.json`` each.

Only the main rank writes ``events.jsonl``, and the rank that failed first is often another.
"""

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAILURES = "failures"
"""The folder in ``run.dir``."""
_KINDS = {"rank": int, "host": str, "time": int | float, "error": str, "is_cause": bool}
"""What is left, and of which type."""


def lost_a_peer(error: BaseException) -> bool:
    """Whether it is an error of gloo or NCCL, as all ranks get it when one has ended."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)


def leave_failure(
    run_dir: Path, rank: int, error: BaseException, *, is_cause: bool | None = None
) -> None:
    """Write down why this rank ends, if the disk lets it; ``is_cause`` follows from the error."""
    left = {
        "rank": rank,
        "host": platform.node(),
        "time": time.time(),
        "error": describe(error),
        "is_cause": not lost_a_peer(error) if is_cause is None else is_cause,
    }
    with contextlib.suppress(OSError):
        (run_dir / FAILURES).mkdir(exist_ok=True)
        (run_dir / FAILURES / f"rank_{rank:05d}.json").write_text(json.dumps(left))


def describe(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def collect_failures(run_dir: Path) -> list[dict[str, Any]]:
    """What was left, earliest first; and forget it.

    What no rank has left so, as after a bit flipped, is passed over: it decides nothing.
    """
    found = []
    for path in sorted((run_dir / FAILURES).glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            left = json.loads(path.read_text())
            if _is_failure(left):
                found.append(left)
    shutil.rmtree(run_dir / FAILURES, ignore_errors=True)
    return sorted(found, key=lambda failure: failure["time"])


def _is_failure(left: object) -> bool:
    return isinstance(left, dict) and all(
        isinstance(left.get(key), kind) for key, kind in _KINDS.items()
    )


def suspected_hosts(
    failures: Sequence[dict[str, Any]], hosts: Sequence[str], world_size: int
) -> list[str]:
    """Where the first rank failed by itself; else where ranks were killed while others could tell.

    Empty where no rank left a word, as after a power cut: then it is any of them.
    """
    if causes := [failure["host"] for failure in failures if failure["is_cause"]]:
        return causes[:1]
    if not failures or not hosts:
        return []
    told = {failure["rank"] for failure in failures}
    silent = [rank for rank in range(world_size) if rank not in told]
    return list(dict.fromkeys(hosts[rank * len(hosts) // world_size] for rank in silent))
