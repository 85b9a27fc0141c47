"""What only a pass over every sample tells, and a plan needs: its hash, and what of it fits.

An order in a file is passed over likewise, each of its rows a sample. A result is small, so it can
be remembered: of the processes of a run one makes the pass, of those of the next run none.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from triptych.data.dataset.sizes import hash_column
from triptych.data.make_once import read_or_make
from triptych.data.plan.plan_sources import PlanSource
from triptych.errors import DataError

WORTH_REMEMBERING = 1_000_000
"""Samples from which on a pass takes longer than reading its result."""
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Passes:
    """What the passes over all sources of a plan tell."""

    hash: str
    """xxh3-128, in hex, of all that decides the order and the costs."""
    num_fitting: list[int]
    """Samples of each source that fit into a pack."""
    misfits: list[int | None]
    """The first sample of each source that does not fit."""
    num_tokens: list[int] = field(default_factory=list)
    """Of the samples of each source that fit; empty where one has no end."""


Remember = Callable[[str, int, Callable[[], Passes]], Passes]
"""Takes a key that all of it follows from, the number of samples, and the pass itself."""


def compute_anew(key: str, num_samples: int, compute: Callable[[], Passes]) -> Passes:
    """Make the pass, remember nothing."""
    return compute()


def remember_in(folders: Sequence[Path]) -> Remember:
    """Remember what is worth it in the first of some folders that can be written."""

    def remember(key: str, num_samples: int, compute: Callable[[], Passes]) -> Passes:
        if num_samples < WORTH_REMEMBERING:
            return compute()
        passes = read_or_make(
            [folder / f"{key}.passes.json" for folder in folders],
            read=lambda path: _read(path, key),
            write=lambda file: file.write(_file_content(key, asdict(compute()))),
        )
        return compute() if passes is None else passes

    return remember


def pass_over(
    sources: Sequence[PlanSource], head: str, *, seq_len: int, max_patches: int
) -> Passes:
    """Hash all counts, and count what fits into a pack.

    Args:
        sources: of the plan, in order.
        head: what the hash begins with.
        seq_len: tokens in a pack, at most.
        max_patches: ViT patches in a pack, at most.

    Raises:
        DataError: counts are not what they were when their file was written.
    """
    digest = xxhash.xxh3_128()
    digest.update(head.encode())
    for source in sources:
        digest.update(repr((source.name, len(source))).encode())
        _hash_sizes(source, digest)
    fitting = [_count_fitting(source, seq_len, max_patches) for source in sources]
    numbers, misfits = zip(*fitting, strict=True)
    passes = Passes(digest.hexdigest(), list(numbers), list(misfits))
    if all(source.limit is not None for source in sources):
        for source in sources:
            passes.num_tokens.append(_count_tokens(source, seq_len, max_patches))
    return passes


def _hash_sizes(source: PlanSource, digest: xxhash.xxh3_128) -> None:
    sizes = source.sizes
    columns = (sizes.num_tokens, sizes.num_patches, sizes.num_patch_pairs)
    sizes.check()
    for column, expected in zip(columns, sizes.summary.xxh3_128, strict=True):
        of_column = xxhash.xxh3_128()
        hash_column(column, digest, of_column)
        if of_column.hexdigest() != expected:
            raise DataError(
                f"source {source.name!r}: {sizes.file} is damaged, the hash of its counts is not "
                "the recorded one  -> remove the file: it is made again"
            )


def _count_fitting(source: PlanSource, seq_len: int, max_patches: int) -> tuple[int, int | None]:
    """How many samples fit, and the first that does not; the summary knows where all do."""
    summary = source.sizes.summary
    if summary.most_tokens <= seq_len and summary.most_patches <= max_patches:
        return len(source), None
    num_fitting, misfit = 0, None
    for start in range(0, len(source), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        fits = source.fits(chunk, seq_len=seq_len, max_patches=max_patches)
        num_fitting += int(np.count_nonzero(fits))
        if misfit is None and not fits.all():
            misfit = start + int(fits.argmin())
    return num_fitting, misfit


def _count_tokens(source: PlanSource, seq_len: int, max_patches: int) -> int:
    total = 0
    for start in range(0, len(source), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        fits = source.fits(chunk, seq_len=seq_len, max_patches=max_patches)
        total += int(source.sizes.num_tokens[chunk].sum(where=fits))
    return total


def _file_content(key: str, passes: dict[str, Any]) -> bytes:
    """The key is hashed too: a file under the name of another plan is no file of this one."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps([key, passes]).encode())
    return json.dumps({"passes": passes, "xxh3_128": digest}).encode()


def _read(path: Path, key: str) -> Passes | None:
    """None where there is no such file, or one that is damaged, or of a plan of another key."""
    try:
        found = path.read_bytes()
        passes = json.loads(found)["passes"]
        return Passes(**passes) if found == _file_content(key, passes) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
