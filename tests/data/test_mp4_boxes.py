"""Files of MP4's kind that were cut, wherever that was, and whole ones with anything behind."""

import re

import pytest

from triptych.data.media.mp4_boxes import what_is_cut
from triptych.tests.helpers.videos import video


def box(name: str, size: int, content: int | None = None) -> bytes:
    """As many bytes of content as its size allows, or another number."""
    content = size - 8 if content is None else content
    return size.to_bytes(4) + name.encode() + b"." * content


HEAD = box("ftyp", 16) + box("moov", 40)
FRAGMENT = box("moof", 24) + box("mdat", 100)
LONG = (1).to_bytes(4) + b"mdat" + (66).to_bytes(8) + b"." * 50
WHOLE = {
    "frames behind the index": HEAD + box("mdat", 90),
    "index behind the frames": box("ftyp", 16) + box("mdat", 90) + box("moov", 40),
    "QuickTime's": box("wide", 8) + box("mdat", 90) + box("moov", 40),
    "up to the end": HEAD + box("mdat", 0, 90),
    "a long size": HEAD + LONG,
    "fragments": HEAD + FRAGMENT * 3,
    "fragments with indexes": HEAD + (box("styp", 12) + box("sidx", 52) + FRAGMENT) * 3,
    "an index at the end": HEAD + FRAGMENT + box("mfra", 30),
    "a cut index at the end": HEAD + FRAGMENT + box("mfra", 30, 5),
    "text behind": HEAD + FRAGMENT + b"made by a camera\n",
    "zeros behind": HEAD + FRAGMENT + bytes(40),
    "nothing after a size below 8": HEAD + box("mdat", 90) + box("free", 3, 20),
    "a few bytes behind": HEAD + box("mdat", 90) + b"\n\n",
    "of another kind": b"RIFF" * 9,
    "empty": b"",
}
CUT = {
    "in the index": (HEAD[:-3], "its last box, moov, ends at byte 56 of 53"),
    "in the frames": (HEAD + box("mdat", 90, 70), "its last box, mdat, ends at byte 146 of 134"),
    "in a long size": (HEAD + LONG[:11], "its last box, mdat, ends at byte 72 of 67"),
    "in frames of a long size": (HEAD + LONG[:60], "its last box, mdat, ends at byte 122 of 116"),
    "in a fragment's head": (
        HEAD + FRAGMENT + FRAGMENT[:20],
        "its last box, moof, ends at byte 204 of 200",
    ),
    "before a fragment's frames": (
        HEAD + FRAGMENT + FRAGMENT[:24],
        "its last box, moof, announces frames that are not there",
    ),
    "within a header": (HEAD + FRAGMENT + FRAGMENT[:5], "its last 5 bytes only begin a box"),
}


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_nothing_is_missing_of_a_whole_file(data):
    assert what_is_cut(data) is None


@pytest.mark.parametrize(("data", "missing"), CUT.values(), ids=CUT)
def test_what_is_missing_is_said(data, missing):
    assert what_is_cut(data) == missing


WRITERS = {
    "a fragment per keyframe": ("mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
    "an index before each fragment": ("mpeg4", {"movflags": "dash+frag_every_frame"}),
    "one fragment": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "no fragments": ("mpeg4", {}),
}


@pytest.mark.parametrize(("codec", "options"), WRITERS.values(), ids=WRITERS)
def test_of_all_cuts_within_the_frames_only_that_behind_a_fragment_is_none(codec, options):
    """At every byte of files as ffmpeg writes them."""
    data = video(30, codec=codec, options=options)
    frames = [found.start() for found in re.finditer(b"mdat", data)]
    ends = [at - 4 + int.from_bytes(data[at - 4 : at]) for at in frames]
    cuts = range(frames[0] + 4, ends[-1])
    assert [end for end in cuts if what_is_cut(data[:end]) is None] == ends[:-1]
