"""Datasets of which some media are damaged, as a disk or a network damages them."""

from pathlib import Path

from triptych.data.dataset.dataset import Dataset


def flip_bits(folder: Path, every: int = 1) -> None:
    """Flips a bit in each ``every``-th picture or video of a dataset; its index stays as it is."""
    dataset = Dataset.open(folder, folder.name)
    media = [item for i in range(len(dataset)) for item in dataset.sample(i).media]
    shards: dict[Path, bytearray] = {}
    for item in media[::every]:
        shard = folder / "shards" / f"{item.shard:06d}.tar"
        content = shards.setdefault(shard, bytearray(shard.read_bytes()))
        content[item.offset + item.size // 2] ^= 1
    for shard, content in shards.items():
        shard.write_bytes(content)
