"""What torchrun shows last: the error of the rank that failed first.

It ends with a box about the ranks that failed. What a rank has left in the file that
TORCHELASTIC_ERROR_FILE names stands in it, and that of the cause stands last.
"""

import contextlib
import json
import os
import time
from pathlib import Path

LATER_S = 60
"""How much later than it came an error counts that most likely has its cause on another rank."""


def speaks_first(text: str, *, is_cause: bool = True) -> bool:
    """Leave the text for torchrun. Returns whether this is the first rank of its node to do so.

    When a rank has ended, the others fail for want of it, and the first line tells enough of them.
    Without torchrun every process is the first.

    Args:
        text: the error.
        is_cause: false where the error may come from another rank's death, as of kill -9, which
            left no text: torchrun takes the earliest for the cause, and tells of that one last.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name:
        return True
    file, second = Path(name), int(time.time())
    try:
        (file.parent.parent / "spoken").touch(exist_ok=False)
    except FileExistsError:
        first, said = False, text.splitlines()[0]
    except OSError:
        return True
    else:
        first, said = True, text
        second -= 1  # earlier than those that fail in the same second
    if not is_cause:
        second += LATER_S
    extra = {"py_callstack": said, "timestamp": str(second)}
    with contextlib.suppress(OSError):
        file.write_text(json.dumps({"message": {"message": said, "extraInfo": extra}}))
    return first
