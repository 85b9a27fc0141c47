"""What a committed checkpoint consists of, and whether it still does.

``MANIFEST.json`` lists every file with size, xxh3-128 and writer; ``COMMIT``, written last, holds
the hash of the manifest. A folder without a matching ``COMMIT`` is not a checkpoint.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from triptych.checkpoints.layout import (
    COMMIT,
    MANIFEST,
    CheckpointFolder,
    StepName,
    state_of,
    writer_of,
)
from triptych.data.hashed_files import HashedFile, hash_file
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, on_every_rank, on_rank_0

FORMAT = 2
"""1 held megatron-core's torch_dist shards, and pickles."""
UNREADABLE = "  -> nothing was changed; make the files readable and type the command again"


@dataclass(kw_only=True, frozen=True, slots=True)
class SavedFile(HashedFile):
    """One file as it was when the checkpoint was committed."""

    writer: int
    """Rank."""


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """The contents of ``MANIFEST.json``."""

    step: int
    attempt: int
    info: dict[str, Any]
    """What the run says of itself: plan hash, stage, layout."""
    files: dict[str, SavedFile]
    """By path in the folder, with forward slashes."""


def record_files(folder: Path, rank: int, known: Mapping[Path, HashedFile]) -> dict[str, SavedFile]:
    """Hash and sync to disk the files that ``rank`` wrote, and the folders they lie in.

    Those that are ``known`` are hashed, and on disk, already.
    """
    records = {}
    parents = {folder}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if writer_of(name) != rank or not path.is_file():  # by name first: others have thousands
            continue
        record = known.get(path) or hash_file(path, sync=True)
        records[name] = SavedFile(**asdict(record), writer=rank)
        parents.add(path.parent)
    for parent in parents:
        sync_folder(parent)
    return records


def write_manifest(folder: CheckpointFolder, manifest: CheckpointManifest) -> None:
    """Write ``MANIFEST.json``, then ``COMMIT``, each on disk before the next operation starts."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1) + "\n"
    content = text.encode()
    write_synced(folder.manifest, content)
    write_synced(folder.commit, f"{xxhash.xxh3_128_hexdigest(content)}\n".encode())


class DamagedError(CheckpointError):
    """A checkpoint has other bytes than were committed, or none where there should be some."""


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a committed folder.

    Raises:
        DamagedError: COMMIT or MANIFEST.json is missing, or they do not belong together.
        CheckpointError: it has a format that this version does not know, or is another's copy.
        OSError: COMMIT or MANIFEST.json cannot be read, which says nothing of what is in them.
    """
    try:
        commit = CheckpointFolder(folder).commit.read_bytes().decode(errors="replace").strip()
        manifest = CheckpointFolder(folder).manifest.read_bytes()
    except FileNotFoundError as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from error
    digest = xxhash.xxh3_128_hexdigest(manifest)
    if digest != commit:
        raise DamagedError(f"{MANIFEST} has xxh3-128 {digest}, {COMMIT} says {commit!r}")
    content = json.loads(manifest)
    if (found := content.pop("format")) != FORMAT:
        raise CheckpointError(
            f"{folder} has format {found}, this version reads {FORMAT}"
            "  -> use the version that wrote it, which its environment.json names; this one "
            "imports what that exports (launch/convert.py)"
        )
    files = {name: SavedFile(**record) for name, record in content.pop("files").items()}
    return CheckpointManifest(files=files, **content)


def verify(folder: Path, ranks: Ranks) -> list[str]:
    """What is damaged in a checkpoint, file by file; empty if it is good. Reads every byte once.

    A file too many among those of the ranks is damage as well: whoever loads takes what is there.
    Each rank hashes its share of the files. Every rank must call this; all get the same answer.

    Raises:
        CheckpointError: on every rank: a file cannot be read, so nobody knows whether it is good;
            or the checkpoint is of another format, or under the name of another step.
    """
    try:
        manifest = on_rank_0(ranks, lambda: _read_named(folder), os_error=CheckpointError)
    except DamagedError as error:
        return [str(error)]
    files = manifest.files
    largest_first = sorted(files, key=lambda name: (-files[name].size, name))
    share = largest_first[ranks.rank :: ranks.world_size]

    def check() -> list[str]:
        too_many = _too_many(folder, files) if ranks.rank == 0 else []
        return [*too_many, *(text for name in share if (text := _check(folder, name, files[name])))]

    try:
        everyone = on_every_rank(ranks, check, os_error=CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}{UNREADABLE}") from error
    return sorted({text for texts in everyone for text in texts})


def _read_named(folder: Path) -> CheckpointManifest:
    """The manifest, of the checkpoint that the folder's name says, where it is a step's name."""
    try:
        manifest = read_manifest(folder)
    except OSError as error:
        raise CheckpointError(f"{error}{UNREADABLE}") from error
    own = str(StepName(attempt=manifest.attempt, step=manifest.step))
    if state_of(folder.name) == "" and folder.name != own:
        raise CheckpointError(
            f"{folder} holds {own}, by its manifest"
            "  -> give it that name, or one that is no step's, as my_copy"
        )
    return manifest


def _check(folder: Path, name: str, record: SavedFile) -> str | None:
    try:
        size = (folder / name).stat().st_size
        if size != record.size:
            return f"{name} has {size} bytes, {MANIFEST} says {record.size}"
        digest = hash_file(folder / name).xxh3_128
    except FileNotFoundError:
        return f"{name} is missing"
    if digest != record.xxh3_128:
        return f"{name} has xxh3-128 {digest}, {MANIFEST} says {record.xxh3_128}"
    return None


def _too_many(folder: Path, files: Mapping[str, SavedFile]) -> list[str]:
    """What lies in the folders of the ranks' files and is not listed; hidden files do not count."""
    parents = sorted({name.rpartition("/")[0] for name in files} - {""})
    found = [f"{parent}/{entry}" for parent in parents for entry in _entries(folder / parent)]
    return [f"{name} is not in {MANIFEST}" for name in found if name not in files]


def _entries(folder: Path) -> list[str]:
    """Names in it; none where it is missing, which its files tell."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if not name.startswith("."))


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file; it and its name are on disk afterwards."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
