r"""Between Hugging Face folders and our checkpoints.

    python launch/convert.py import Qwen2-VL-7B-Instruct runs/imported
    python launch/convert.py export runs/7b/stage3 exported --tokenizer Qwen2-VL-7B-Instruct \
        --dtype bf16    # else in the dtype that they are stored in
    python launch/convert.py verify exported runs/7b/stage3     # tensors, settings, then answers
    torchrun --nproc-per-node 8 launch/convert.py import ...    # each rank reads its pieces
    torchrun --nproc-per-node 8 launch/convert.py export ...    # each rank writes its files

A run starts from an imported model with --config-dir runs/imported model=Qwen2-VL-7B-Instruct
init.checkpoint=runs/imported: the import writes the model's sizes, which come from its config.json,
as a model group beside the weights.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.checkpoints.hf.conversion import Exported

try:
    from triptych.configs.model_schema import ModelConfig
    from triptych.configs.schema import Precision
    from triptych.launch.cli import long_import, run
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed -> make install && source .venv/bin/activate")


def main(argv: Sequence[str]) -> None:
    """Convert in the direction that is asked for."""
    options = _parser().parse_args(argv)
    with long_import():  # late: --help does not pay for torch
        from triptych.checkpoints.hf import conversion
        from triptych.checkpoints.model_file import read_model
        from triptych.parallel.dtypes import DTYPES

    is_main = os.environ.get("RANK", "0") == "0"
    if options.direction == "import":
        folder = conversion.import_hf(options.source, options.output)
        if is_main:
            model = read_model(folder)
            group = _write_group(options.output, model)
            print(
                f"{folder}\nits sizes: {group}\nstart from it: --config-dir {options.output} "
                f"model={model.name} init.checkpoint={options.output}"
            )
        return
    if options.direction == "verify":
        from triptych.launch.inference.verification import verify

        found = verify(options.exported, options.checkpoint, answers=not options.tensors_only)
        print("\n".join([*found, f"{options.exported} is what {options.checkpoint} says"]))
        return
    dtype = options.dtype and DTYPES[Precision[options.dtype]]
    done = conversion.export_hf(options.source, options.output, options.tokenizer, dtype)
    if is_main:
        print("\n".join(_told(done, options.output)))


def _told(done: "Exported", output: Path) -> list[str]:
    """What a person should know of an export."""
    origin = done.origin
    lines = [f"{done.checkpoint} -> {output}", done.told]
    if origin.is_base:
        lines.append(f"of {origin.stage}: a base model, whose texts end with <|endoftext|>")
    return [
        *filter(None, lines),
        f"how to score it: {output}/EVALUATE.md; how to open it in Python: docs/first_hour.md",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    into = directions.add_parser("import", help="Hugging Face folder -> checkpoint")
    into.add_argument("source", type=Path, help="folder with config.json and safetensors")
    into.add_argument("output", type=Path, help="folder that gets checkpoints/ and model/")
    out = directions.add_parser("export", help="checkpoint -> Hugging Face folder")
    out.add_argument("source", type=Path, help="run folder, its checkpoints/, or one checkpoint")
    out.add_argument("output", type=Path, help="new folder")
    out.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder, copied along")
    out.add_argument(
        "--dtype", choices=[choice.name for choice in Precision], help="default: as they are stored"
    )
    check = directions.add_parser("verify", help="compare an export with its checkpoint")
    check.add_argument("exported", type=Path, help="folder that export wrote")
    check.add_argument("checkpoint", type=Path, help="run folder or checkpoint that it is of")
    check.add_argument(
        "--tensors-only",
        action="store_true",
        help="tensors and settings, two tensors in memory; no model is loaded to answer",
    )
    return parser


def _write_group(output: Path, model: ModelConfig) -> Path:
    """The model's sizes as the choice ``model=NAME`` of ``--config-dir OUTPUT``."""
    import yaml

    from triptych.checkpoints.model_file import plain

    path = output / "model" / f"{model.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(plain(model), sort_keys=False))
    return path


if __name__ == "__main__":
    run(main)
