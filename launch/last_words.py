"""What torchrun shows last: the error of the rank that failed first.

It ends with a box about the ranks that failed. What a rank has left in the file that
TORCHELASTIC_ERROR_FILE names stands in it, and that of the cause stands last.
"""

import contextlib
import json
import os
import time
from pathlib import Path


def speaks_first(text: str) -> bool:
    """Leave the text for torchrun. Returns whether this is the first rank of its node to do so.

    The first is the cause: when a rank has ended, the others fail for want of it, and the first
    line tells enough of them. Without torchrun every process is the first.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name:
        return True
    file, now = Path(name), int(time.time())
    try:
        (file.parent.parent / "spoken").touch(exist_ok=False)
    except FileExistsError:
        first, said, second = False, text.splitlines()[0], now
    except OSError:
        return True
    else:
        first, said, second = True, text, now - 1  # torchrun takes the earliest for the cause
    extra = {"py_callstack": said, "timestamp": str(second)}
    with contextlib.suppress(OSError):
        file.write_text(json.dumps({"message": {"message": said, "extraInfo": extra}}))
    return first
