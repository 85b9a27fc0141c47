"""Whether a file of MP4's kind is whole: it consists of boxes, and each begins with its size.

A decoder takes what is there of a file that was cut, and one in fragments does not say beforehand
how long it lasts; so only its boxes tell.

Source: ISO/IEC 14496-12, 4.2 (boxes) and 8.8 (movie fragments).
"""

_HEADER_BYTES = 8
"""Of a box: its size, and its type."""
_FIRST = {"ftyp", "styp", "moov", "mdat", "wide", "free", "skip"}
"""With which files begin; QuickTime's of before ``ftyp`` with one of the last five."""
_BEFORE_FRAMES = {"styp", "sidx", "prft", "emsg", "moof"}
"""What stands before the frames of a fragment."""
_NEEDED = {"ftyp", "moov", "mdat"} | _BEFORE_FRAMES
"""A file that ends within one of these lacks frames. Behind the frames anything may stand."""


def what_is_cut(data: bytes) -> str | None:
    """What a file lacks at its end, in words; None where it is whole, or of another kind.

    A file that ends with a whole fragment is whole: whether there were more, nothing tells.
    """
    if _type(data, 0) not in _FIRST:
        return None
    at, last, is_fragmented = 0, "", False
    while at + _HEADER_BYTES <= len(data):
        last, ends_at = _type(data, at), _end(data, at)
        if last in _NEEDED and ends_at > len(data):
            return f"its last box, {last}, ends at byte {ends_at} of {len(data)}"
        if not at + _HEADER_BYTES <= ends_at <= len(data):
            return None
        at, is_fragmented = ends_at, is_fragmented or last == "moof"
    if last in _BEFORE_FRAMES:
        return f"its last box, {last}, announces frames that are not there"
    if is_fragmented and at < len(data):
        return f"its last {len(data) - at} bytes only begin a box"
    return None


def _type(data: bytes, at: int) -> str:
    return data[at + 4 : at + 8].decode("latin-1")


def _end(data: bytes, at: int) -> int:
    """Where the box ends that begins at a byte, as it says.

    A size of 0 is up to the end of the file; after 1, eight bytes behind the type hold the size.
    """
    size = int.from_bytes(data[at : at + 4])
    if size == 0:
        return len(data)
    if size == 1:
        size = max(2 * _HEADER_BYTES, int.from_bytes(data[at + 8 : at + 16]))
    return at + size
