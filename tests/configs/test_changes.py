"""What differs from the configuration of a checkpoint, and which of it makes another data plan."""

from pathlib import Path

import pytest

from triptych.configs.changes import Change, changes, table
from triptych.configs.compose import load_config, save_config
from triptych.train.start import causes_of_another_plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(load_config([]), path)
    return path


def test_nothing_differs(saved: Path) -> None:
    assert changes(saved, load_config([])) == []
    how_to_start = ["resume=never", "init.allow_random=false", "data.accept_new_plan=true"]
    assert changes(saved, load_config(how_to_start)) == []


def test_every_difference_is_told_as_it_is_typed(saved: Path) -> None:
    words = ["stage.llm.lr=3e-4", "train.num_steps=null", "parallel.pp=2", "parallel.layout=[1,3]"]
    more = ["stage.llm.decay=linear", "log.tensorboard=true", "data.mixtures.stage2.chat=0.5"]
    assert table(changes(saved, load_config([*words, *more]))).splitlines() == [
        "  stage.llm.lr               0.001 -> 0.0003",
        "  stage.llm.decay            cosine -> linear",
        "  train.num_steps            20 -> null",
        "  parallel.pp                1 -> 2",
        "  parallel.layout            auto -> [1,3]",
        "  data.mixtures.stage2.chat  none -> 0.5",
        "  log.tensorboard            false -> true",
    ]


def test_keys_of_another_version_are_told_too(saved: Path, tmp_path: Path) -> None:
    text = saved.read_text().replace("  num_workers: 2\n", "  num_readers: 2\n")
    (tmp_path / "config.yaml").write_text(text)
    assert changes(tmp_path / "config.yaml", load_config([])) == [
        Change("data.num_workers", "none", "2"),
        Change("data.num_readers", "2", "none"),
    ]


CAUSES = (
    "seed=5",
    "train.seq_len=512",
    "data.max_patches=2048",
    "data.min_pixels=3136",
    "data.max_pixels=12544",
    "data.window=32",
    "data.weigh_by=tokens",
    "data.order=mine.npy",
    "data.sources.text.max_epochs=2.5",
    "data.mixtures.stage2.strings=0.9",
    "data.root=elsewhere",
)


@pytest.mark.parametrize("word", CAUSES)
def test_the_cause_of_another_plan_is_told_apart_from_what_is_none(word: str, saved: Path) -> None:
    others = ["stage.llm.lr=3e-4", "parallel=tp2", "data.num_workers=1", "run.keep=9"]
    config = load_config([word, *others, "data.mixtures.stage1.strings=0.9"])
    found = causes_of_another_plan(changes(saved, config), config)
    if word == "data.root=elsewhere":
        names = ["captions", "every_kind", "strings", "text"]
        assert sorted(change.key for change in found) == [f"data.sources.{n}.path" for n in names]
    else:
        assert [f"{change.key}={change.now}" for change in found] == [word]
