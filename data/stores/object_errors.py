"""What every object storage says of an object that is not the one that was copied there.

To be raised ``from None``: the client's own error tells less.
"""

from triptych.errors import DataError


def cut_object(url: str, offset: int, size: int) -> DataError:
    """It ends too early."""
    return DataError(
        f"{url} ends before the {size} bytes from {offset} on: it was cut  -> copy it again"
    )


def replaced_object(url: str) -> DataError:
    """It was another one when a part of it had been read."""
    return DataError(
        f"{url} was replaced while it was read"
        "  -> copy the shard again, and let nobody write there during a run"
    )
