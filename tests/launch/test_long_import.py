"""Nothing looks for garbage while torch is imported, nor through what was imported."""

import gc
import weakref

import pytest

from triptych.launch.cli import long_import


class Node:
    """One that may hold itself, and then goes with a collection only."""


@pytest.mark.parametrize("error", [None, ModuleNotFoundError])
def test_what_was_made_meanwhile_is_left_alone_and_other_garbage_is_found(error):
    before = gc.get_freeze_count()
    try:
        with pytest.raises(error) if error else long_import(), long_import():
            assert not gc.isenabled()
            stays = [Node()]
            if error:
                raise error
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        assert not any(one is stays for one in gc.get_objects())
        garbage = Node()
        garbage.itself = garbage
        told = weakref.ref(garbage)
        del garbage
        gc.collect()
        assert told() is None
    finally:
        gc.unfreeze()
