"""Between Hugging Face folders and our checkpoints.

    python launch/convert.py import Qwen2-VL-7B-Instruct runs/imported
    python launch/convert.py export runs/7b/stage3 exported --tokenizer Qwen2-VL-7B-Instruct
    torchrun --nproc-per-node 8 launch/convert.py import ...    # each rank reads its pieces

A run starts from an imported model with init.checkpoint=runs/imported.

The model's sizes come from config.json; the import prints them as a model group.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

try:
    from triptych.configs.schema import ModelConfig
    from triptych.launch.cli import run
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed -> make install && source .venv/bin/activate")


def main(argv: Sequence[str]) -> None:
    """Convert in the direction that is asked for."""
    options = _parser().parse_args(argv)
    from triptych.checkpoints import convert  # late: --help does not pay for torch
    from triptych.checkpoints.model_file import read_model
    from triptych.data.types import Limits

    if options.direction == "import":
        folder = convert.import_hf(options.source, options.output)
        model = read_model(folder)
        print(
            f"{folder}\nstart from it with init.checkpoint={options.output} "
            "and a model group of these sizes:"
        )
        print(_as_yaml(model))
        return
    limits = Limits(options.min_pixels, options.max_pixels)
    folder = convert.export_hf(options.source, options.output, options.tokenizer, limits)
    print(f"{folder} -> {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    into = directions.add_parser("import", help="Hugging Face folder -> checkpoint")
    into.add_argument("source", type=Path, help="folder with config.json and safetensors")
    into.add_argument("output", type=Path, help="folder that gets checkpoints/")
    out = directions.add_parser("export", help="checkpoint -> Hugging Face folder")
    out.add_argument("source", type=Path, help="run folder, its checkpoints/, or one checkpoint")
    out.add_argument("output", type=Path, help="new folder")
    out.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder, copied along")
    out.add_argument("--min-pixels", type=int, default=56 * 56)
    out.add_argument("--max-pixels", type=int, default=16384 * 28 * 28)
    return parser


def _as_yaml(model: ModelConfig) -> str:
    """The model as a file for ``--config-dir FOLDER model=NAME``, put at FOLDER/model/NAME.yaml."""
    import yaml

    text: str = yaml.safe_dump(asdict(model), sort_keys=False)
    return text


if __name__ == "__main__":
    run(main)
