"""Caption pairs in webdataset shards, which stay where they are: samples name their bytes.

Members of one sample stand together and share what comes before the first point of their names:
``000012.jpg`` and ``000012.txt``, or ``000012.json`` with a ``caption`` or ``text``.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from triptych.data.media.kinds import KINDS
from triptych.data.parts import MediaBytes
from triptych.data.prepare.inputs.raw_sample import FileSegment, RawSample
from triptych.errors import DataError

IMAGES = frozenset("jpg jpeg png webp gif bmp tif tiff avif jp2 ppm".split())
VIDEOS = frozenset("mp4 mkv webm mov avi".split())
CAPTIONS = ("txt", "caption", "text")
MAX_BYTES = max(kind.max_bytes for kind in KINDS.values())
"""Of a member that is read into memory."""
BESIDES = frozenset({"cls", "url", "json"})
"""Members that may stand beside a pair, and are passed over."""


def read_tar(segment: FileSegment) -> Iterator[RawSample]:
    """The samples of one shard.

    Raises:
        DataError: the shard is cut or damaged between its members, so samples would be lost.
    """
    path, seen = Path(segment.file).resolve(), set[str]()
    for number, (key, members) in enumerate(groupby(_members(path), key=_key), start=1):
        group = list(members)
        size = sum(member.size for member in group)
        read = partial(_refuse_again, key) if key in seen else partial(_pair, path, key, group)
        yield RawSample(path, number, size, read)
        seen.add(key)


def _refuse_again(key: str) -> NoReturn:
    raise DataError(
        f"{key} stands in this shard a second time, apart from the first"
        "  -> members of a sample stand together, and each sample once"
    )


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                end = member.offset_data + member.size
                if end > size:
                    raise DataError(f"{path} is cut within {member.name}  -> copy it again")
                if member.isfile():
                    yield member
            end = shard.offset
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be read as a tar file: {error}") from error
    with path.open("rb") as file:  # tarfile takes a bad header for the end
        file.seek(end)
        size = 0
        is_blank = True
        for chunk in iter(partial(file.read, 1 << 20), b""):
            size, is_blank = size + len(chunk), is_blank and not chunk.strip(b"\0")
        if size < tarfile.BLOCKSIZE or not is_blank:
            raise DataError(
                f"{path} is damaged at byte {end}: no member and no end of the archive"
                "  -> copy it again"
            )


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _pair(path: Path, key: str, group: Sequence[tarfile.TarInfo]) -> dict[str, Any]:
    by_ending = {member.name[len(key) + 1 :].lower(): member for member in group}
    if len(by_ending) < len(group):
        raise DataError(f"{key} has two members of the same name")
    media = [(ending, m) for ending, m in by_ending.items() if _last(ending) in IMAGES | VIDEOS]
    if len(media) != 1:
        raise DataError(f"{key} has {len(media)} images or videos; a caption pair has one")
    ending, member = media[0]
    unknown = [e for e in by_ending if e not in {ending, *CAPTIONS, *BESIDES}]
    if unknown:
        raise DataError(f"{key} has {', '.join(unknown)} besides, which nothing reads")
    kind = "image" if _last(ending) in IMAGES else "video"
    content = MediaBytes(member.name, _read(path, member), path, member.offset_data)
    return {"content": [{"type": kind, kind: content}, _caption(path, key, by_ending)]}


def _last(ending: str) -> str:
    return ending.rpartition(".")[2]


def _caption(path: Path, key: str, by_ending: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    for ending in CAPTIONS:
        if ending in by_ending:
            try:
                return {"type": "text", "text": _read(path, by_ending[ending]).decode()}
            except UnicodeDecodeError as error:
                raise DataError(f"{key}.{ending} is not UTF-8: {error}") from error
    try:
        content = json.loads(_read(path, by_ending["json"])) if "json" in by_ending else {}
    except ValueError as error:
        raise DataError(f"{key}.json is not JSON: {error}") from error
    found = [content[name] for name in ("caption", "text") if name in content]
    if len(found) != 1:
        raise DataError(f"{key} has no caption: neither .txt nor one of caption and text in .json")
    return {"type": "text", "text": found[0]}


def _read(path: Path, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_BYTES:
        raise DataError(f"{member.name} has {member.size} bytes, above the bound of {MAX_BYTES}")
    with path.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)
