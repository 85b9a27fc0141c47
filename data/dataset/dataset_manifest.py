"""``dataset.yaml``: what a dataset folder holds."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from triptych.configs.model_schema import TokensConfig
from triptych.data.hashed_files import HashedFile
from triptych.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "dataset.yaml"


@dataclass(kw_only=True, slots=True)
class DatasetManifest:
    """The content of ``dataset.yaml``."""

    version: int = FORMAT_VERSION
    tokenizer: str
    """Fingerprint of the tokenizer the text was encoded with."""
    tokens: TokensConfig
    """Ids of its special tokens."""
    num_samples: int
    num_tokens: int
    """Placeholders counted once."""
    num_targets: int
    num_media: int
    num_skipped: int
    """Bad samples that were left out; ``quarantine.jsonl`` names them."""
    shards_elsewhere: dict[str, int] = field(default_factory=dict)
    """Path of each webdataset shard that is indexed in place -> its size. In order of number."""
    files: dict[str, HashedFile] = field(default_factory=dict)
    """Path below the folder -> size and hash."""


def write_manifest(manifest: DatasetManifest, folder: Path) -> None:
    """Writes it; the same dataset gives the same bytes."""
    content = asdict(manifest)
    if not manifest.shards_elsewhere:
        del content["shards_elsewhere"]
    (folder / MANIFEST).write_text(yaml.safe_dump(content, sort_keys=False))


def read_manifest(folder: Path) -> tuple[DatasetManifest, bytes]:
    """The manifest of a dataset folder, and its bytes.

    Raises:
        DataError: it is missing, damaged or of another version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(
            f"{folder} is no dataset: {MANIFEST} is missing"
            "  -> write it with launch/prepare.py --output"
        )
    data = file.read_bytes()
    return _parsed(data, file), data


def _parsed(data: bytes, file: Path) -> DatasetManifest:
    try:
        content: dict[str, Any] = yaml.safe_load(data)
        version = content["version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{file} has format version {version}; this is triptych for version "
                f"{FORMAT_VERSION}  -> prepare the dataset again"
            )
        content["tokens"] = TokensConfig(**content["tokens"])
        content["files"] = {path: HashedFile(**r) for path, r in content["files"].items()}
        return DatasetManifest(**content)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {error!r}  -> prepare the dataset again") from error
