"""Keys of earlier versions, as the run folders of those days have them."""

from collections.abc import Iterator, Mapping

FORMER_KEYS: Mapping[str, str] = {
    "model.vision.in_channels": "nothing any more, as pictures have three channels",
    "parallel.overlap.tp": "parallel.overlap.tp_comm",
    "stage.global_batch_size": "train.global_batch_size",
    "stage.seq_len": "train.seq_len",
}
"""Key of then -> what it is today."""


def former_keys(content: Mapping[str, object]) -> Iterator[str]:
    """A line for each key of a configuration, nested as in its file, that is called otherwise."""
    for key, today in FORMER_KEYS.items():
        *groups, name = key.split(".")
        found: object = content
        for group in groups:
            found = found.get(group) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and name in found:
            yield f"{key} is {today}"
