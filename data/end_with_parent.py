"""A pool's process waits for work for ever, also when its parent was killed: end it then."""

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """Watch the parent from a thread. Called once, in the child."""
    parent = parent_process()
    assert parent is not None, "not the child of a pool"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
