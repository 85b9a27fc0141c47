"""The kinds of media: what each is measured by, and how its frames come about.

Index, plan, tokens, reader and preparation ask the row of a kind; none of them knows an image from
anything else.

Geometry is the model's (``VisionConfig``), limits are the run's (``PixelLimits``); a dataset holds
neither.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from triptych.configs.model_schema import VisionConfig
from triptych.data.media.decoder import decode
from triptych.data.media.image import (
    check_shape,
    decode_image,
    image_frames,
    image_grid,
    image_grids,
)
from triptych.data.media.video import video_frames, video_grid, video_grids, video_shape
from triptych.data.types import Clip, Media, MediaKind, PixelLimits
from triptych.errors import DataError

Grid = tuple[int, int, int]
"""Frames, rows and columns of unmerged patches."""
Shape = tuple[int, int, int, int]
"""Of the frames that are looked at: how many, 3 colours, height and width."""


class Extent(NamedTuple):
    """What a media item measures, as the index records it."""

    width: int
    """Pixels, of the upright picture."""
    height: int
    frames: int = 1
    duration_ms: int = 0
    start_ms: int = 0
    """Of a clip, in its file."""


class Kind(Protocol):
    """One kind of media."""

    name: str
    """The word for it: the ``type`` and the key of a part of a record, and in messages."""
    extension: str
    """Ending of its files in a shard, where the name it came with has none that will do."""
    max_bytes: int
    """Of a file; a larger one is not prepared."""

    def measure(self, data: bytes, where: str, clip: Clip | None = None) -> Extent:
        """Decode a file, to see that it can be.

        Args:
            data: the whole file.
            where: names the file or sample in errors.
            clip: what of it is measured, where it is a video; None for all.

        Raises:
            DataError: it cannot be decoded, or is nothing to train on.
        """

    def grids(
        self, rows: NDArray[np.void], limits: PixelLimits, vision: VisionConfig
    ) -> NDArray[np.int64]:
        """Grids of many items, (num_rows, 3) int64.

        Args:
            rows: (num_rows,) with the fields of ``Extent``, as an index has them.
            limits: of the run.
            vision: of the model.
        """

    def grid(self, media: Media, limits: PixelLimits, vision: VisionConfig) -> Grid:
        """The grid of one item; the same as ``grids`` gives."""

    def shape(self, media: Media, limits: PixelLimits, vision: VisionConfig) -> Shape:
        """How many frames of one item are looked at, and how large; sides are whole grids."""

    def frames(self, data: bytes, media: Media, shape: Shape, where: str) -> NDArray[np.uint8]:
        """Decode and resize. Pixels follow from these arguments, this folder and its libraries.

        Args:
            data: the whole file.
            media: what the dataset says of it.
            shape: of the result.
            where: names the file or sample in errors.

        Raises:
            DataError: the file cannot be decoded, or is not of the size that ``media`` says.
        """


class ImageKind:
    """A still picture: one frame, repeated to fill a patch."""

    name = "image"
    extension = "img"
    max_bytes = 512 << 20
    """An image within the bound of its pixels, 16 bits per channel, not compressed."""

    def measure(self, data: bytes, where: str, clip: Clip | None = None) -> Extent:
        """Width and height of the upright picture."""
        assert clip is None, "records give clips to videos alone"
        image = decode_image(data, where)
        return Extent(image.width, image.height)

    def grids(
        self, rows: NDArray[np.void], limits: PixelLimits, vision: VisionConfig
    ) -> NDArray[np.int64]:
        """(num_rows, 3) int64, the first column 1."""
        return image_grids(rows["height"], rows["width"], limits, vision)

    def grid(self, media: Media, limits: PixelLimits, vision: VisionConfig) -> Grid:
        """(1, rows, columns)."""
        return image_grid(media.height, media.width, limits, vision)

    def shape(self, media: Media, limits: PixelLimits, vision: VisionConfig) -> Shape:
        """(1, 3, height, width)."""
        _, rows, columns = self.grid(media, limits, vision)
        return 1, 3, rows * vision.patch_size, columns * vision.patch_size

    def frames(self, data: bytes, media: Media, shape: Shape, where: str) -> NDArray[np.uint8]:
        """The one frame."""
        image = decode_image(data, where)
        if image.size != (media.width, media.height):
            raise DataError(
                f"{where}: {image.width}x{image.height} pixels, but its dataset says "
                f"{media.width}x{media.height}  -> prepare the dataset again"
            )
        return image_frames(image, shape[2:])


class VideoKind:
    """A video: some of its frames, as many in a patch as ``temporal_patch_size`` says."""

    name = "video"
    extension = "mp4"
    max_bytes = 2 << 30

    def measure(self, data: bytes, where: str, clip: Clip | None = None) -> Extent:
        """Size of the upright frames, how many, and how long they last. All of it is decoded."""
        extent = Extent(**decode(lambda decoder: decoder.extent(data, where, clip)))
        check_shape((extent.width, extent.height), where)
        return extent

    def grids(
        self, rows: NDArray[np.void], limits: PixelLimits, vision: VisionConfig
    ) -> NDArray[np.int64]:
        """(num_rows, 3) int64."""
        return video_grids(
            rows["height"],
            rows["width"],
            rows["frames"],
            rows["duration_ms"],
            limits.video,
            vision,
        )

    def grid(self, media: Media, limits: PixelLimits, vision: VisionConfig) -> Grid:
        """(pairs of frames, rows, columns)."""
        return video_grid(media, limits.video, vision)

    def shape(self, media: Media, limits: PixelLimits, vision: VisionConfig) -> Shape:
        """(num_frames, 3, height, width)."""
        return video_shape(media, limits.video, vision)

    def frames(self, data: bytes, media: Media, shape: Shape, where: str) -> NDArray[np.uint8]:
        """The frames that are looked at."""
        return video_frames(data, media, shape, where)


KINDS: dict[MediaKind, Kind] = {MediaKind.IMAGE: ImageKind(), MediaKind.VIDEO: VideoKind()}


def kind_of(code: int) -> Kind:
    """The row of a kind.

    Args:
        code: a ``MediaKind``, or what an index says is one.

    Raises:
        DataError: there is no such kind.
    """
    if code not in KINDS:
        raise DataError(f"there is no media kind {code}: the index is damaged  -> copy it again")
    return KINDS[MediaKind(code)]
