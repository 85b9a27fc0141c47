"""The YAML groups, the command line, and what is refused of it."""

import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import yaml

from triptych.configs import compose, usage
from triptych.configs.compose import load_config, read_config, save_config
from triptych.configs.former_keys import FORMER_KEYS
from triptych.configs.habits import HABITS
from triptych.configs.overrides import schema_keys
from triptych.configs.schema import Config, Decay, Precision, Recompute
from triptych.configs.validate import validate
from triptych.errors import ConfigError

CONFIGS = Path(compose.__file__).parent
DEFAULTS = {
    "model": "debug",
    "stage": "2",
    "data": "sample",
    "optimizer": "adamw",
    "parallel": "single",
    "cluster": "local",
    "run": "default",
    "log": "default",
}
CHOICES = [(path.parent.name, path.stem) for path in sorted(CONFIGS.glob("*/*.yaml"))]
MODELS = [name for group, name in CHOICES if group == "model"]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_and_validates(
    group: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    largest = ["model=qwen2_vl_72b"] if name.startswith(("tp4", "tp8")) else []
    config = load_config([f"{group}={name}", *largest, "init.allow_random=true"])
    for path in (config.data.tokenizer, *(s.path for s in config.data.sources.values())):
        Path(path).mkdir(parents=True)  # as launch/prepare.py would have
    validate(config, world_size=config.parallel.tp * config.parallel.pp)


@pytest.mark.parametrize("stage", ["1", "2", "3", "warmup"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_goes_through_every_stage(model: str, stage: str) -> None:
    config = load_config([f"stage={stage}", f"model={model}", "init.allow_random=true"])
    validate(config, world_size=4)
    assert config.model.name == model
    assert config.stage.name in config.data.mixtures


def test_the_groups_are_those_of_the_documentation() -> None:
    assert {group for group, _ in CHOICES} == set(DEFAULTS)
    assert compose._default_choices() == DEFAULTS


def test_nothing_given_is_the_debug_model_in_stage_2() -> None:
    config = load_config([])
    assert (config.model.name, config.stage.name) == ("debug", "stage2")
    assert (config.train.num_steps, config.train.precision) == (20, Precision.fp32)
    assert config.run.dir == "runs/debug/stage2"
    assert config.stage.token_budget > 20 * config.train.seq_len * config.train.global_batch_size
    validate(config, world_size=1)


@pytest.mark.parametrize(
    ("number", "trains"),
    [("1", (True, True, False)), ("2", (True, True, True)), ("3", (False, True, True))],
)
@pytest.mark.parametrize("quote", ["", "'"])
def test_an_integer_chooses_a_stage(number: str, trains: tuple[bool, ...], quote: str) -> None:
    stage = load_config([f"stage={quote}{number}{quote}"]).stage
    assert stage.name == f"stage{number}"
    assert (stage.vit.train, stage.adapter.train, stage.llm.train) == trains


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("qwen2_vl_2b", (1536, 28, 12, 2, 128, 8960, 151936, True)),
        ("qwen2_vl_7b", (3584, 28, 28, 4, 128, 18944, 152064, False)),
        ("qwen2_vl_72b", (8192, 80, 64, 8, 128, 29568, 152064, False)),
    ],
)
def test_sizes_of_the_released_models(model: str, sizes: tuple[int, ...]) -> None:
    config = load_config([f"model={model}"]).model
    llm, vit = config.language, config.vision
    assert sizes == (
        llm.hidden_size,
        llm.num_layers,
        llm.num_heads,
        llm.num_kv_heads,
        llm.head_dim,
        llm.intermediate_size,
        llm.vocab_size,
        llm.tie_word_embeddings,
    )
    assert (llm.rms_norm_eps, llm.rope_theta, llm.mrope_section) == (1e-6, 1e6, [16, 24, 24])
    assert (vit.depth, vit.hidden_size, vit.num_heads, vit.intermediate_size) == (
        32,
        1280,
        16,
        5120,
    )
    assert (config.tokens.endoftext, config.tokens.image_pad) == (151643, 151655)


@pytest.mark.parametrize(
    ("words", "head_dim"),
    [
        ([], 48),
        (["model.language.hidden_size=96"], 24),
        (["model.language.num_heads=6"], 32),
        (["model.language.head_dim=64"], 64),
        (["model=qwen2_vl_2b", "model.language.num_heads=24"], 64),
        (["model.language.num_heads=0"], 192),  # which the rules refuse
    ],
)
def test_head_dim_follows_from_the_sizes_unless_it_is_given(
    words: list[str], head_dim: int
) -> None:
    assert load_config(words).model.language.head_dim == head_dim


def test_the_papers_token_budgets() -> None:
    budgets = [load_config([f"stage={n}", "model=qwen2_vl_7b"]).stage.token_budget for n in (1, 2)]
    assert budgets == [600 * 10**9, 800 * 10**9]


def test_overrides_of_every_type() -> None:
    config = load_config(
        [
            "stage=3",
            "parallel=tp2",
            "parallel.pp=2",
            "parallel.layout=[1,3]",
            "parallel.recompute.llm=full",
            "train.precision=bf16",
            "train.num_steps=null",
            "stage.llm.decay=linear",
            "train.seq_len=128",
            "train.global_batch_size=4",
            "init.checkpoint=runs/a/b",
            "run.dir='runs/a=b, c'",
            "seed=7",
        ]
    )
    assert (config.parallel.tp, config.parallel.pp, config.parallel.layout) == (2, 2, [1, 3])
    assert config.parallel.recompute.llm is Recompute.full
    assert config.train.precision is Precision.bf16
    assert config.train.num_steps is None
    assert config.stage.llm.decay is Decay.linear
    assert (config.train.seq_len, config.train.global_batch_size) == (128, 4)
    assert (config.init.checkpoint, config.run.dir) == ("runs/a/b", "runs/a=b, c")
    assert config.seed == 7


def test_the_command_line_wins_over_the_debug_model() -> None:
    config = load_config(["train.seq_len=64", "train.num_steps=3", "data.window=8"])
    assert (config.train.seq_len, config.train.num_steps, config.data.window) == (64, 3, 8)


def test_a_mixture_changes_on_the_command_line() -> None:
    config = load_config(["data.mixtures.stage2.chat=0.5", "data.mixtures.mine.text=1"])
    assert config.data.mixtures["stage2"]["chat"] == 0.5
    assert config.data.mixtures["mine"] == {"text": 1.0}


def test_own_data_from_a_config_dir(tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    (folder / "data").mkdir(parents=True)
    own = (CONFIGS / "data/example.yaml").read_text() + "window: 99\n"
    (folder / "data/own.yaml").write_text(own)
    data = load_config(["--config-dir", str(folder), "data=own"]).data
    assert data.window == 99  # the debug model has 256, but a data file has the last word
    assert set(data.sources) == {"pairs", "interleaved", "text", "instructions", "heldout"}


def test_own_data_that_change_a_built_in_mixture(tmp_path: Path) -> None:
    """What the file leaves out stays as it is; the command line still has the last word."""
    (tmp_path / "data").mkdir()
    own = "defaults: [sample]\nmixtures: {stage2: {text: 1}, mine: {chat: 2.0}}\n"
    (tmp_path / "data/own.yaml").write_text(own)
    (tmp_path / "data/owner.yaml").write_text("defaults: [own]\nmixtures: {mine: {chat: 3}}\n")
    argv = ["--config-dir", str(tmp_path), "data=owner"]
    mixtures = load_config(argv).data.mixtures
    assert mixtures["stage2"] == {"strings": 0.5, "captions": 0.3, "text": 1.0, "every_kind": 0.1}
    assert (mixtures["stage1"]["captions"], mixtures["mine"]["chat"]) == (0.4, 3.0)
    assert {type(w) for weights in mixtures.values() for w in weights.values()} == {float}
    typed = load_config([*argv, "data.mixtures.mine.chat=4"]).data.mixtures
    assert typed["mine"] == {"chat": 4.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: {a: {pth: x}}", r"data/own.yaml: .*[Kk]ey 'pth'"),
        ("mixtures: {stage2: 5}", r"data/own.yaml: data.mixtures.stage2: Value 5"),
        ("mixtures: {a: {b: x, c: on}}\ntokenizer: t", r"b=x must be a number +-> try .*\n.*a.c"),
        ("sourcs: {}", r"data/own.yaml: .*'sourcs'"),
        ("window: many", r"data/own.yaml: data.window: Value 'many'"),
        ("sources: [", r"while parsing.*own.yaml"),
        ("root: x", r"data.tokenizer is missing +-> try data.tokenizer=VALUE"),
    ],
)
def test_a_bad_file_in_a_config_dir(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        load_config(["--config-dir", str(tmp_path), "data=own"])


def test_a_config_dir_without_groups(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no configuration: no cluster/NAME.yaml, "):
        load_config(["--config-dir", str(tmp_path)])


def test_several_config_dirs(tmp_path: Path) -> None:
    for name, line in {"first": "window: 99", "second": "window: 77"}.items():
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / f"{name}.yaml").write_text(f"defaults: [sample]\n{line}\n")
    (tmp_path / "second" / "model").mkdir()
    (tmp_path / "second" / "model" / "own.yaml").write_text("defaults: [debug]\nname: own\n")
    folders = [word for name in ("first", "second") for word in ("--config-dir", tmp_path / name)]
    config = load_config([*map(str, folders), "data=first", "model=own"])
    assert (config.data.window, config.model.name) == (99, "own")
    (tmp_path / "second" / "data" / "first.yaml").write_text("defaults: [sample]\n")
    with pytest.raises(ConfigError, match=r"second/data/first.yaml and .*first/data/first.yaml"):
        load_config([*map(str, folders), "data=first"])


def test_a_config_dir_that_shadows_a_choice(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample.yaml").write_text("window: 1\n")
    with pytest.raises(ConfigError, match=r"data/sample.yaml: this name is built in"):
        load_config(["--config-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tp=2", "there is no key tp  -> try parallel.tp=2"),
        ("+parallel.tpp=2", "there is no key parallel.tpp  -> try parallel.tp=2"),
        ("parallel.foo=3", "there is no key parallel.foo  -> try "),
        ("+parallel.foo=3", "there is no key parallel.foo  -> try "),
        ("qqqqqq=3", "there is no key qqqqqq  -> try --print-config"),
        ("modle=debug", "there is no key modle  -> try model=debug"),
        ("hydra.run.dir=x", "there is no key hydra.run.dir  -> try run.dir=x"),
        ("stage=4", "stage has no choice 4  -> try stage=1, stage=2, stage=3 or stage=warmup"),
        ("model=qwen2_vl_27b", "no choice qwen2_vl_27b  -> try model=qwen2_vl_7b"),
        ("model=null", "model has no choice null  -> try model=debug"),
        ("+model=debug", "model is chosen already  -> try model=debug"),
        ("~stage.vit", "no key can be removed  -> try KEY=null"),
        ("parallel.tp", "is no override  -> try KEY=VALUE"),
        ("parallel.tp=1,2", "one value for each key  -> try parallel.tp=[1,2] for a list"),
        ("run.dir=a=b", "run.dir=a=b cannot be read  -> try KEY='VALUE'"),
        ("--foo", "--foo is no option  -> try --help"),
        ("parallel.tp=abc", "parallel.tp=abc: Value 'abc'"),
        ("train.precision=fp16", "Invalid value 'fp16', expected one of [fp32, bf16]"),
        ("train=5", "train=5: "),
        ("data.sources.mine.path=x", "data.sources.mine.path: Key 'mine'"),
        (
            "data.mixtures.stage2={text:1}",
            "one source at a time  -> try data.mixtures.STAGE.SOURCE=1.0",
        ),
        ("data.mixtures.stage2.text=x", "weights are numbers, one source at a time"),
        ("data.validation=heldout", "-> try data.validation.SOURCE=1.0"),
        ("data.sources=${seed}", "data.sources: Cannot assign int to Dict[str, SourceConfig]"),
        ("model.language.mrope_section=${seed}", "model.language.mrope_section: Invalid value"),
        ("run.dir=${nothing}", "run.dir: Interpolation key 'nothing' not found"),
        ("model.name=???", "Missing mandatory value: model.name"),
        ("data.tokenizer=???", "data.tokenizer is missing  -> try data.tokenizer=VALUE"),
        ("--config-dir", "--config-dir: expected one argument"),
    ],
)
def test_what_the_command_line_may_not_say(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config([word])


@pytest.mark.parametrize("name", sorted(HABITS))
def test_keys_of_other_tools_are_answered_with_a_key_that_exists(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config([f"{name}=5"])
    remedy = str(refused.value).partition("  -> try ")[2]
    assert f"{name}=5: there is no key {name}" in str(refused.value)
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    typed = re.findall(r"([a-z_.]+\w)=", remedy)
    assert typed
    assert set(typed) <= {*schema_keys(), *groups}
    assert "=5" in remedy or "{}" not in HABITS[name]
    with pytest.raises(ConfigError, match=re.escape(remedy.replace("=5", "=VALUE"))):
        load_config([f"--{name.replace('_', '-')}"])


def test_no_habit_hides_a_key_of_ours() -> None:
    """A key that exists is taken as it is; only what is unknown is looked up."""
    assert not set(HABITS) & set(schema_keys())


def test_all_wrong_words_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^3 problems in this run\n") as caught:
        load_config(["tp=2", "stage=5", "seed=1", "modle=debug"])
    assert len(str(caught.value).splitlines()) == 4


def test_a_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(["stage=1", "parallel.pp=2", "parallel.layout=[1,3]", "run.keep=9"])
    save_config(config, tmp_path / "config.yaml")
    assert "${" not in (tmp_path / "config.yaml").read_text()
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("a: [1", "is not the configuration of a run: while parsing"),
        ("parallel: {tpp: 2}", "is not the configuration of a run: .*'tpp'"),
        ("seed: 1", "is not the configuration of a run: .*missing"),
    ],
)
def test_a_file_that_is_no_configuration(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_every_key_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config([]), path)
    content = yaml.safe_load(path.read_text())
    for key in FORMER_KEYS:
        group, _, name = key.rpartition(".")
        reduce(dict.__getitem__, group.split("."), content)[name] = None
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refused:
        read_config(path)
    title, *lines = str(refused.value).splitlines()
    assert title == f"{path} was written by an earlier version; of its keys"
    assert lines[:-1] == [f"  {key} is {today}" for key, today in FORMER_KEYS.items()]
    assert lines[-1].startswith("  -> use the version that wrote it, or resume the run")


def test_no_former_key_hides_one_of_today() -> None:
    assert not set(FORMER_KEYS) & set(schema_keys())


def test_print_config_prints_what_would_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_config(["--print-config", "stage=3"])
    assert exit_.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert read_config(tmp_path / "printed.yaml") == load_config(["stage=3"])


def test_only_rank_0_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        load_config(["--help"])
    assert capsys.readouterr().out == ""


def test_help_names_every_choice_and_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, atexit; from triptych.configs.compose import load_config;"
        "import triptych.configs.validate;"
        "atexit.register(lambda: print('torch' in sys.modules));"
        "load_config(['--help'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert shown.endswith("False\n")
    assert all(name in shown for _, name in CHOICES)
    assert "[debug]" in shown
    assert list(tmp_path.iterdir()) == []  # Hydra leaves nothing behind


def test_the_overrides_of_the_help_exist() -> None:
    keys = {*schema_keys(Config), *DEFAULTS}
    assert set(usage.OVERRIDES) <= keys


def test_the_documentation_shows_what_is_printed() -> None:
    shown = (CONFIGS.parent / "docs/configuration.md").read_text()
    examples = re.findall(
        r"\$ torchrun (?:--nproc-per-node (\d+) )?\S+ (.*)\n((?:    .*\n)+)", shown
    )
    assert len(examples) == 2
    for num_ranks, words, told in examples:
        with pytest.raises(ConfigError) as caught:
            validate(load_config(words.split()), int(num_ranks or 1))
        lines = f"ConfigError: {caught.value}".splitlines()
        assert told == "".join(f"    {line}\n" for line in lines)


def test_the_documentation_has_the_overrides_of_the_help() -> None:
    shown = (CONFIGS.parent / "docs/configuration.md").read_text()
    keys = re.findall(r"^\| `([\w.]+)` \|", shown, re.MULTILINE)
    assert [key for key in keys if key in usage.OVERRIDES] == list(usage.OVERRIDES)
