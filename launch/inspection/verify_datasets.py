"""Reads datasets whole, and compares every file with what was prepared.

python launch/prepare.py verify datasets/chats datasets/web
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from triptych.data.dataset.dataset import Dataset
from triptych.data.stores.media_store import open_store

REQUESTS_PER_S = 100.0
"""Of 16 MiB each to an object storage, beside those of runs."""


def verify(args: Sequence[str]) -> None:
    """Say of each dataset that all is well.

    Raises:
        DataError: files of one are not as they were prepared; names each.
    """
    options = parse_args(args)
    for folder in options.datasets:
        store = open_store(options.shards, REQUESTS_PER_S) if options.shards else None
        dataset = Dataset.open(folder, folder.name, store=store)
        num_bytes = sum(file.size for file in dataset.manifest.files.values())
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            dataset.verify(bar.update)
        print(f"{folder}: all {len(dataset.manifest.files)} files are as they were prepared")


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="prepare.py verify", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DATASET", help="dataset folders")
    parser.add_argument(
        "--shards", metavar="URL", help="where the shards of a dataset lie, if not in its folder"
    )
    return parser.parse_args(args)
