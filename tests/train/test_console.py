"""All that is said comes out in one form: with its time, and with the rank of who is not rank 0."""

import logging
import re
import subprocess
import sys
import warnings

import pytest

from triptych.train.console import console, say, take_over_libraries

DATED = re.compile(r"\d\d-\d\d \d\d:\d\d:\d\d (.*)")


@pytest.fixture
def library():
    """A logger that brings its own way to the terminal, as torch and DeepSpeed do."""
    logger = logging.getLogger("brings_its_own")
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    yield logger
    logger.handlers.clear()


def undated(text: str) -> list[str]:
    """The lines, each of which must begin with a time."""
    return [DATED.fullmatch(line)[1] for line in text.splitlines()]


def speak() -> None:
    say("one\ntwo")
    logging.getLogger("triptych.checkpoints.store").warning("checkpoint %s", "is damaged")
    logging.getLogger("library").info("not worth it")
    logging.getLogger("library.part").warning("worth it")


def test_rank_0_tells_and_warnings_go_to_stderr(capsys):
    with console(0):
        speak()
    told = capsys.readouterr()
    assert undated(told.out) == ["one", "two"]
    assert undated(told.err) == [
        "warning: checkpoint is damaged",
        "warning from library.part: worth it",
    ]


def test_another_rank_only_warns_under_its_number(capsys):
    with console(3):
        speak()
    told = capsys.readouterr()
    assert told.out == ""
    assert undated(told.err) == [
        "[rank 3] warning: checkpoint is damaged",
        "[rank 3] warning from library.part: worth it",
    ]


def test_python_warnings_go_the_same_way():
    """In a process of its own: pytest listens to warnings itself."""
    code = (
        "import warnings\n"
        "from triptych.train.console import console\n"
        "with console(2): warnings.warn('look out')\n"
        "warnings.warn('as ever')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, *_ = ended.stderr.splitlines()
    assert re.search(
        r"^\S+ \S+ \[rank 2\] warning from py.warnings: .*UserWarning: look out$", first
    )
    assert second.endswith("UserWarning: as ever")


def test_libraries_lose_their_own_way(library, capsys):
    library.setLevel(logging.ERROR)
    with console(0):
        take_over_libraries()
        library.warning("below its level")
        library.error("above")
    assert undated(capsys.readouterr().err) == ["error from brings_its_own: above"]


def test_log_files_of_libraries_stay(library, tmp_path):
    library.addHandler(logging.FileHandler(tmp_path / "log"))
    take_over_libraries()
    library.error("kept")
    library.handlers[0].close()
    assert (tmp_path / "log").read_text() == "kept\n"


def test_nothing_is_left_behind(capsys):
    before = (list(logging.getLogger().handlers), logging.getLogger("triptych").level)
    shown = warnings.showwarning
    with pytest.raises(ValueError, match="over"), console(0):
        raise ValueError("over")
    assert (list(logging.getLogger().handlers), logging.getLogger("triptych").level) == before
    assert warnings.showwarning is shown
    say("to nobody")
    assert capsys.readouterr().out == ""


def test_a_pipe_that_nobody_reads_is_told_to_who_speaks(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError), console(0):
        say("hello?")
