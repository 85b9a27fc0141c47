"""``convert.py verify``: an export equals its checkpoint, and each planted fault is named."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from triptych.checkpoints.hf.tensor_files import SINGLE
from triptych.data.tokenizer import CHAT_TEMPLATE
from triptych.data.types import MediaKind
from triptych.errors import CheckpointError, DataError
from triptych.launch import convert, sample
from triptych.launch.inference.answering import Answerer, Question
from triptych.tests.helpers.runs import Runs
from triptych.tests.helpers.videos import video

pytestmark = pytest.mark.distributed

LAYER = "model.layers.1"
NEARLY_AS_DRAWN = ("stage.llm.lr=1e-6", "stage.llm.min_lr=1e-7")
"""A step at the usual rate teaches little but to end every answer at once."""


@pytest.fixture(scope="module")
def runs(pool, digits, tmp_path_factory) -> Runs:
    """Stage 1 and, from it, stage 3, saved by tp 2 x pp 2; as many kv heads as q heads."""
    runs = Runs(pool, digits, tmp_path_factory.mktemp("runs"))
    words = ("train.num_steps=1", "model.language.num_kv_heads=4", *NEARLY_AS_DRAWN)
    runs.train("one", "single", *words, "stage=1")
    start = f"init.checkpoint={runs.dir('one')}"
    runs.train("three", "tp2 pp2", *words, "stage=3", start)
    return runs


@pytest.fixture(scope="module")
def exported(runs, pool, digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    words = ["export", str(runs.dir("three")), str(folder)]
    pool(2).run(convert.main, argv=[*words, "--tokenizer", str(digits / "tokenizer")])
    return folder


def told(exported: Path, checkpoint: Path, *options: str) -> str:
    """What verify prints, or refuses with."""

    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            convert.main(["verify", str(exported), str(checkpoint), *options])
    except CheckpointError as error:
        return str(error)
    return output.getvalue()


def test_an_export_is_what_its_checkpoint_says_and_answers_as_we_do(exported, runs, pool):
    (text,) = pool(1).run(told_of_all, exported=exported, checkpoint=runs.dir("three"))
    assert "every tensor: bit-equal" in text
    assert "every setting, and the chat template: as trained" in text
    assert re.search(r"an image by Pillow: pixels at most 0 from training's", text)
    assert "a video: frames and pixels are training's, and not compared" in text
    assert len(re.findall(r"both answer .* \(\d tokens\)", text)) >= 3
    apart = re.findall(
        r"(?:an image by Pillow|a video|text alone): logits (\S+) of the largest", text
    )
    assert len(apart) == 3
    print(f"logits of transformers and ours: {apart}")
    assert text.endswith(f"{exported} is what {runs.dir('three')} says\n")


def told_of_all(exported: Path, checkpoint: Path) -> str:
    return told(exported, checkpoint)


def test_the_folder_tells_its_whole_story(exported, runs):
    card = (exported / "README.md").read_text()
    assert f"| run | `{runs.dir('three')}` |" in card
    assert "| stage | stage3 |" in card
    assert re.search(r"- \S+/one/checkpoints/step_000000001\.0: stage1, step 1", card)
    assert "base model" not in card
    assert re.search(r"\| data plan \| `\w+` \|", card)


def test_an_export_of_stage_1_says_that_it_is_a_base_model(runs, pool, digits, tmp_path):
    words = ["export", str(runs.dir("one")), str(tmp_path / "out")]
    (text,) = pool(1).run(printed, words=[*words, "--tokenizer", str(digits / "tokenizer")])
    assert "of stage1: a base model, whose texts end with <|endoftext|>" in text
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"


def printed(words: list[str]) -> str:

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        convert.main(words)
    return output.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """An image, a video, and the half of a video."""
    folder = tmp_path_factory.mktemp("files")
    Image.radial_gradient("L").resize((180, 130)).convert("RGB").save(folder / "a.png")
    (folder / "a.mp4").write_bytes(content := video(20, rate=5, width=90, height=60))
    (folder / "half.mp4").write_bytes(content[: len(content) // 2])
    return folder


def test_an_answer_is_written_as_it_comes(exported, runs, pool, files):
    (answers,) = pool(1).run(
        streamed_and_whole, checkpoint=runs.dir("three"), tokenizer=exported, files=files
    )
    assert [streamed for streamed, _ in answers] == [f"{whole}\n" for _, whole in answers]
    assert any(whole for _, whole in answers)


def streamed_and_whole(checkpoint: Path, tokenizer: Path, files: Path) -> list[tuple[str, str]]:
    """What sample.py prints, and all answers at once: about an image, a video and text alone."""
    answerer, streamed = Answerer.load(checkpoint, tokenizer), []
    image, video = files / "a.png", files / "a.mp4"
    for shown in (["--image", str(image)], ["--video", str(video)], []):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            sample.main([*words_of(checkpoint, tokenizer), *shown])
        streamed.append(output.getvalue())
    questions = [
        Question(image.read_bytes(), "What is this?", "image"),
        Question(video.read_bytes(), "What is this?", "video", MediaKind.VIDEO),
        Question(None, "What is this?", ""),
    ]
    grids = [answerer.prompt(question).grid_thw.tolist() for question in questions]
    assert [grid[0][0] for grid in grids[:2]] == [1, 4]
    return list(zip(streamed, answerer.read(questions, max_new_tokens=5), strict=True))


def words_of(checkpoint: Path, tokenizer: Path) -> list[str]:
    words = ["--checkpoint", str(checkpoint), "--tokenizer", str(tokenizer)]
    return [*words, "--prompt", "What is this?", "--max-new-tokens", "5"]


def test_a_video_that_cannot_be_read_is_named(exported, runs, pool, files):
    words = [*words_of(runs.dir("three"), exported), "--video", str(files / "half.mp4")]
    (text,) = pool(1).run(refused_sample, words=words)
    assert text.startswith(f"{files}/half.mp4: cannot be decoded as a video: ")


def refused_sample(words: list[str]) -> str:
    with pytest.raises(DataError) as error:
        sample.main(words)
    return str(error.value)


# --- planted faults


def a_layer_left_at_random(state: dict) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    names = [name for name in state if name.startswith(f"{LAYER}.") and "weight" in name]
    for name in names:
        state[name] = torch.randn(state[name].shape, generator=generator)
    assert len(names) == 9
    return [rf"{re.escape(name)}: [\d,]+ of [\d,]+ elements are not those of" for name in names]


def q_and_k_swapped(state: dict) -> list[str]:
    q, k = (f"{LAYER}.self_attn.{x}_proj.weight" for x in "qk")
    state[q], state[k] = state[k], state[q]
    return [rf"{re.escape(name)}: [\d,]+ of 9,216 elements are not those of" for name in (q, k)]


def a_norm_dropped(state: dict) -> list[str]:
    del state[f"{LAYER}.input_layernorm.weight"]
    return [rf"missing: {LAYER}\.input_layernorm\.weight"]


def one_bit_flipped(state: dict) -> list[str]:
    name = "visual.merger.mlp.0.bias"
    state[name].view(torch.int32)[3] ^= 1
    return [rf"{re.escape(name)}: 1 of 256 elements are not those of merger\.fc1\.bias"]


def a_tied_head_doubled(state: dict) -> list[str]:
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2
    return [r"lm_head\.weight is there, but the head is the embedding"]


def a_tensor_too_many(state: dict) -> list[str]:
    state["model.layers.4.input_layernorm.weight"] = torch.ones(96)
    return [r"unexpected: model\.layers\.4\.input_layernorm\.weight"]


TENSORS = [
    a_layer_left_at_random,
    q_and_k_swapped,
    a_norm_dropped,
    one_bit_flipped,
    a_tied_head_doubled,
    a_tensor_too_many,
]


@pytest.mark.parametrize("plant", TENSORS)
def test_a_fault_in_the_tensors_is_named_and_no_other(
    plant: Callable[[dict], list[str]], exported, runs, pool, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    state = load_file(broken / SINGLE)
    expected = plant(state)
    save_file({name: x.contiguous() for name, x in state.items()}, broken / SINGLE)
    check_named(pool, broken, runs, expected)


def check_named(pool, broken: Path, runs: Runs, expected: list[str]) -> None:
    (text,) = pool(1).run(told_of_all, exported=broken, checkpoint=runs.dir("three"))
    title, *lines, remedy = text.splitlines()
    assert title.startswith(f"{broken} is not what {runs.dir('three')}")
    assert remedy.startswith("  -> export it again")
    assert len(lines) == len(expected), text
    assert not [x for x in expected if not any(re.match(f"  {x}", line) for line in lines)], text


def a_template_for_text_alone(folder: Path) -> list[str]:
    template = CHAT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    (folder / "chat_template.jinja").write_text(template)
    return [
        f"the chat template renders {what} otherwise than training did"
        for what in ("an image", "a video", "turns after a system prompt")
    ]


def wrong_limits(folder: Path) -> list[str]:
    change(folder / "preprocessor_config.json", max_pixels=12845056)
    return [r"preprocessor_config\.json: max_pixels=12845056, should be 28224"]


def no_limits_for_videos(folder: Path) -> list[str]:
    size = {"shortest_edge": 56 * 56, "longest_edge": 12845056}
    change(folder / "video_preprocessor_config.json", size=size)
    return [r"video_preprocessor_config\.json: size=.*12845056.*, should be .*28224"]


def wrong_end(folder: Path) -> list[str]:
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    return [r'tokenizer_config\.json: eos_token="<\|endoftext\|>", should be "<\|im_end\|>"']


def another_rotary_base(folder: Path) -> list[str]:
    change(folder / "config.json", rope_theta=10000.0)
    return [r"config\.json: rope_theta=10000\.0, should be 1000000\.0"]


SETTINGS = [
    a_template_for_text_alone,
    wrong_limits,
    no_limits_for_videos,
    wrong_end,
    another_rotary_base,
]


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("plant", SETTINGS)
def test_a_fault_in_the_settings_is_named_and_no_other(
    plant: Callable[[Path], list[str]], exported, runs, pool, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    check_named(pool, broken, runs, plant(broken))


def test_another_step_of_the_run_is_not_what_was_exported(exported, runs, pool):
    (text,) = pool(1).run(told_of_all, exported=exported, checkpoint=runs.dir("one"))
    assert "elements are not those of merger.fc1.weight" in text
    assert "eos_token" in text  # of stage 1
