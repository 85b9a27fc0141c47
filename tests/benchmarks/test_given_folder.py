"""Where benchmarks write."""

import pytest

from triptych.benchmarks.given_folder import parser_with_folder


@pytest.mark.parametrize("there", [".", "new", "of/several/new/ones"])
def test_a_folder_may_be_there_or_is_made(there, tmp_path):
    given = tmp_path / there
    options = parser_with_folder("").parse_args(["--folder", str(given)])
    assert options.folder == given
    assert given.is_dir()


@pytest.mark.parametrize("given", ["file", "file/in/the/way"])
def test_a_folder_that_cannot_be_made_is_refused(given, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        parser_with_folder("").parse_args(["--folder", str(tmp_path / given)])
    assert "-> a folder that is there, or may be made" in capsys.readouterr().err
