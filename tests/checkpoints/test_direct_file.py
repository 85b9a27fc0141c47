"""A big file is what was in memory, whatever its length, its place there, and the file system."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from triptych.checkpoints import direct_file
from triptych.checkpoints.direct_file import BLOCK_BYTES, write_hashed
from triptych.data.hashed_files import hash_file
from triptych.errors import CheckpointError
from triptych.parallel.device import HostBuffer


def content_at(offset: int, num_bytes: int) -> memoryview:
    """So many bytes, which begin ``offset`` after a place that a disk can read from."""
    buffer = HostBuffer()
    buffer.fill([], offset + num_bytes)
    content = memoryview(buffer.content.numpy())[offset:]
    content[:] = os.urandom(num_bytes)
    return content


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "num_bytes", [0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1, 7 * BLOCK_BYTES - 1, 9 * BLOCK_BYTES]
)
def test_the_file_and_its_hash_are_those_of_the_bytes(num_bytes, offset, tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "WRITE_BYTES", 2 * BLOCK_BYTES)
    content, path, turns = content_at(offset, num_bytes), tmp_path / "file", []
    written = write_hashed(path, content, lambda: turns.append(1))
    assert path.read_bytes() == content
    assert written == hash_file(path)
    assert len(turns) >= num_bytes // (2 * BLOCK_BYTES)


def test_where_the_disk_can_read_memory_no_byte_goes_through_the_page_cache(tmp_path, monkeypatch):
    """Or the file system has no such writes, as that of some containers."""
    direct: list[bool] = []
    write_block = direct_file.write_block

    def look(file, block):
        direct.append(bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT))
        num_bytes = write_block(file, block)
        direct[-1] &= bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)
        return num_bytes

    monkeypatch.setattr(direct_file, "write_block", look)
    write_hashed(tmp_path / "file", content_at(0, 3 * BLOCK_BYTES), lambda: None)
    if not can_write_directly(tmp_path):
        pytest.skip("no direct writes on this file system")
    assert direct == [True]


def can_write_directly(folder: Path) -> bool:
    """Asked of the kernel alone."""
    try:
        file = os.open(folder / "asked", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        os.write(file, content_at(0, BLOCK_BYTES))
    except OSError:
        return False
    os.close(file)
    return True


def test_a_file_system_without_direct_writes_is_written_to(tmp_path, monkeypatch):
    def refuse(file, command, flags=0):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return fcntl_of_python(file, command, flags)

    fcntl_of_python = fcntl.fcntl
    monkeypatch.setattr(direct_file.fcntl, "fcntl", refuse)
    content = content_at(0, 3 * BLOCK_BYTES + 5)
    assert write_hashed(tmp_path / "file", content, lambda: None) == hash_file(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


def test_a_save_that_is_given_up_ends_before_the_next_block(tmp_path):
    def give_up() -> None:
        raise CheckpointError("given up")

    with pytest.raises(CheckpointError, match="given up"):
        write_hashed(tmp_path / "file", content_at(0, BLOCK_BYTES), give_up)
    assert (tmp_path / "file").read_bytes() == b""
