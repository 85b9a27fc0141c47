"""Published weights that a run starts from, part by part: ``init.language`` and ``init.vision``.

    parts = open_parts(config.init, config.model, Path(config.data.tokenizer))
    print(table_of_fates(parts, names))
    for part in parts: part.fill(name, parameter, tp_rank, tp)

Opening a folder checks configuration, names and shapes. Each rank then reads its own pieces of one
tensor after the other, in any tp x pp.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.checkpoints.hf import clip_table as clip
from triptych.checkpoints.hf.name_table import (
    HF_HEAD,
    Entry,
    Row,
    TensorShape,
    entries,
    hub_name,
    language_rows,
    vision_rows,
)
from triptych.checkpoints.hf.part_config import (
    clip_differences,
    language_differences,
    open_clip_differences,
    qwen_tower_differences,
)
from triptych.checkpoints.hf.tensor_files import (
    TensorInFile,
    by_pattern,
    open_tensors,
    read_piece,
    tensor_differences,
)
from triptych.checkpoints.hf.transforms import Same
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import InitConfig
from triptych.data.tokenizer import foreign_ids
from triptych.errors import CheckpointError
from triptych.models.init import EMBEDDING, HEAD

QWEN_PATCHES = "visual.patch_embed.proj.weight"
QWEN_DROPPED = {
    "visual.merger.": "the merger is trained for its own language model",
}

OF_OTHER_PARTS = "of other parts than the ViT"


@dataclass(frozen=True, slots=True)
class StartingPart:
    """Weights of one folder, on their way to parameters of ours."""

    key: str
    """``init.language=FOLDER``, for people."""
    entries: Mapping[str, Entry]
    """By our name; an embedding has as many rows as the folder has."""
    dropped: Mapping[str, str]
    """Their tensors that our model has no place for -> why."""
    tensors: Mapping[str, TensorInFile]
    vocab_size: int
    """Rows of our embedding."""

    @property
    def drawn_in_part(self) -> list[str]:
        """Parameters that have more rows than the folder: they are drawn, then filled."""
        return [
            name for name, entry in self.entries.items()
            if name in (EMBEDDING, HEAD) and entry.shape[0] < self.vocab_size
        ]  # fmt: skip

    def fill(self, name: str, parameter: Tensor, tp_rank: int, tp: int) -> None:
        """Copy a parameter, or this tp rank's piece of it, from the folder.

        Of an embedding or a head, the rows that both have; the other rows stay as they are.
        """
        entry = self.entries[name]
        with torch.no_grad():
            if name in (EMBEDDING, HEAD):
                (theirs,) = entry.theirs
                start = tp_rank * len(parameter)
                num_rows = min(max(entry.shape[0] - start, 0), len(parameter))
                parameter[:num_rows].copy_(self.tensors[theirs][start : start + num_rows])
                return
            blocks = entry.transform.blocks
            pieces = [
                read_piece(self.tensors[theirs], entry.sharding, blocks, tp_rank, tp)
                for theirs in entry.theirs
            ]
            parameter.copy_(entry.transform.to_ours(pieces))


class TowerLayout(NamedTuple):
    """One way in which ViTs are published."""

    rows: Iterable[Row]
    dropped: Mapping[str, str]
    """Beginning of a name in the tower -> why it is dropped."""
    differences: list[str]
    tower: str
    """What the names of the tower begin with; all others are of other parts."""


def open_parts(init: InitConfig, model: ModelConfig, tokenizer: Path) -> list[StartingPart]:
    """The folders that the configuration names, all of them checked.

    Args:
        init: with ``language``, ``vision`` or both.
        model: what they are to fill.
        tokenizer: of the run; a token of the language model's own must have the same id there.

    Raises:
        CheckpointError: lists all that does not fit, of both folders.
        ConfigError: a folder's tokenizer cannot be read.
    """
    openers: list[tuple[str | None, Callable[[Path], StartingPart]]] = [
        (init.language, lambda folder: _open_language(folder, model, tokenizer)),
        (init.vision, lambda folder: _open_vision(folder, model)),
    ]
    parts, refusals = [], []
    for folder, opener in openers:
        if folder is None:
            continue
        try:
            parts.append(opener(Path(folder)))
        except CheckpointError as error:
            refusals.append(str(error))
    if refusals:
        raise CheckpointError("\n".join(refusals))
    return parts


def table_of_fates(parts: Sequence[StartingPart], names: Iterable[str]) -> str:
    """What becomes of every tensor: a line for those that differ by the number of their layer.

    Args:
        parts: what the run starts from.
        names: every parameter of the model, of all ranks.
    """
    lines = [line for part in parts for line in (part.key, *_fates_of(part))]
    filled = set(chain.from_iterable(part.entries for part in parts))
    rest = by_pattern(sorted(set(names) - filled))
    if rest:
        lines.append("neither has")
        lines += [f"  initialised  {_counted(name, group)}" for name, group in rest.items()]
    return "\n".join(lines)


def _fates_of(part: StartingPart) -> Iterator[str]:
    for pattern, group in by_pattern(part.entries).items():
        entry = part.entries[group[0]]
        same = isinstance(entry.transform, Same)
        theirs = " + ".join(by_pattern(entry.theirs))
        how = "" if same else f" ({entry.transform.told})"
        if group[0] in (EMBEDDING, HEAD):
            how = _resized(entry.shape[0], part.vocab_size)
        fate = "taken" if same and not how else "transformed"
        yield f"  {fate:<12} {theirs} -> {_counted(pattern, group)}{how}"
    others = [name for name, why in part.dropped.items() if why == OF_OTHER_PARTS]
    if others:
        yield f"  {'dropped':<12} {len(others)} tensors ({OF_OTHER_PARTS})"
    for pattern, group in by_pattern(sorted(part.dropped.keys() - others)).items():
        yield f"  {'dropped':<12} {_counted(pattern, group)} ({part.dropped[group[0]]})"


def _resized(found: int, wanted: int) -> str:
    """The rule by which an embedding gets another number of rows."""
    if found < wanted:
        return f" ({found} rows; {wanted - found} more are drawn at random)"
    return f" (the first {wanted} of {found} rows)" if found > wanted else ""


def _counted(pattern: str, group: Sequence[str]) -> str:
    return pattern if len(group) == 1 else f"{pattern} ({len(group)} layers)"


def _open_language(folder: Path, model: ModelConfig, tokenizer: Path) -> StartingPart:
    problems = language_differences(folder, model.language)
    tensors = open_tensors(folder)
    rows = [
        (name, _with_rows_of(tensors, theirs) if name in (EMBEDDING, HEAD) else theirs, how)
        for name, theirs, how in language_rows(model.language)
    ]
    table = entries(rows, model)
    dropped = {}
    if model.language.tie_word_embeddings and HF_HEAD in tensors:
        dropped[HF_HEAD] = "the head is the embedding"
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        problems += foreign_ids(folder, tokenizer)
    return _checked(f"init.language={folder}", table, dropped, tensors, problems, model)


def _with_rows_of(
    tensors: Mapping[str, TensorInFile], theirs: Mapping[str, TensorShape]
) -> dict[str, TensorShape]:
    """The shapes with as many rows as the folder has: of an embedding they may be more or fewer."""
    return {
        name: (tensors[name].get_shape()[0] if name in tensors else shape[0], *shape[1:])
        for name, shape in theirs.items()
    }


def _open_vision(folder: Path, model: ModelConfig) -> StartingPart:
    tensors = {hub_name(name): tensor for name, tensor in open_tensors(folder).items()}
    layout = _layout_of(folder, tensors, model)
    table = entries(layout.rows, model)
    taken = {theirs for entry in table.values() for theirs in entry.theirs}
    dropped = {}
    for name in tensors.keys() - taken:
        if not name.startswith(layout.tower):
            dropped[name] = OF_OTHER_PARTS
            continue
        reasons = [why for start, why in layout.dropped.items() if name.startswith(start)]
        if reasons:
            dropped[name] = reasons[0]
    return _checked(f"init.vision={folder}", table, dropped, tensors, layout.differences, model)


def _layout_of(
    folder: Path, tensors: Mapping[str, TensorInFile], model: ModelConfig
) -> TowerLayout:
    """By the name of its patch embedding.

    Raises:
        CheckpointError: none of the known ones.
    """
    vision = model.vision
    if QWEN_PATCHES in tensors:
        found = qwen_tower_differences(folder, vision)
        return TowerLayout(vision_rows(vision), QWEN_DROPPED, found, "visual.")
    if clip.OPEN_CLIP_PATCHES in tensors:
        found = open_clip_differences(folder, vision)
        return TowerLayout(clip.open_clip_rows(vision), clip.OPEN_CLIP_DROPPED, found, "visual.")
    for name in tensors:
        prefix, patches, rest = name.partition(clip.TRANSFORMERS_PATCHES)
        if patches and not rest:
            dropped = {f"{prefix}{start}": why for start, why in clip.TRANSFORMERS_DROPPED.items()}
            rows = clip.transformers_rows(vision, prefix)
            return TowerLayout(rows, dropped, clip_differences(folder, vision), prefix)
    raise CheckpointError(
        f"init.vision={folder} holds no ViT that is known  -> a CLIP ViT as transformers or "
        "open_clip saves it, or a Qwen2-VL or Qwen2.5-VL model"
    )


def _checked(
    key: str,
    table: Mapping[str, Entry],
    dropped: Mapping[str, str],
    tensors: Mapping[str, TensorInFile],
    problems: Sequence[str],
    model: ModelConfig,
) -> StartingPart:
    """The part, if configuration and tensors are those of the model.

    Raises:
        CheckpointError: lists all that does not fit.
    """
    wanted = {theirs: shape for entry in table.values() for theirs, shape in entry.theirs.items()}
    found = {name: tuple(t.get_shape()) for name, t in tensors.items() if name not in dropped}
    problems = [*problems, *tensor_differences(wanted, found)]
    if problems:
        raise CheckpointError(
            f"{key} does not fit model.name={model.name}:\n  " + "\n  ".join(problems)
        )
    return StartingPart(key, table, dropped, tensors, model.language.vocab_size)
