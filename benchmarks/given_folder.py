"""Where a benchmark writes: into a folder of its own, in the one that it is given."""

import argparse
import os
from pathlib import Path


def parser_with_folder(description: str) -> argparse.ArgumentParser:
    """Takes ``--folder``; what else a benchmark takes, it adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=_folder,
        required=True,
        help="where to write, on the disk of interest; made where it is missing",
    )
    return parser


def _folder(text: str) -> Path:
    """The folder, made where it is missing."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{error}  -> a folder that is there, or may be made"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written to")
    return path
