"""What every object storage says of an object that ends too early."""

from triptych.errors import DataError


def cut_object(url: str, offset: int, size: int) -> DataError:
    """The error that names it, to be raised ``from None``: the client's own tells less."""
    return DataError(
        f"{url} ends before the {size} bytes from {offset} on: it was cut  -> copy it again"
    )
