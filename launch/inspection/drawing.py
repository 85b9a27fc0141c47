"""The picture: a bar for each segment, its images and frames, then its tokens in boxes."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont, ImageOps

from triptych.launch.inspection.segment_view import SegmentView, TextPiece

WIDTH, MARGIN, GAP = 1400, 16, 4
TEXT_SIZE, LABEL_SIZE, LINE = 15, 10, 36
LARGEST_IMAGE, LARGEST_FRAME = 448, 168
"""Pixels of the longer side; larger ones are reduced for the picture."""
TARGET, OTHER, MEDIA, BAR = "#bfe5c7", "#eceef1", "#c9d9f0", "#1f4e8c"
INK, PALE = "#111418", "#6b7280"
FONTS = ("Noto Sans Mono CJK SC", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "DejaVu Sans Mono")
"""The first that is installed; the last comes with matplotlib, and lacks Chinese."""
LEGEND = "green: counts in the loss    grey: does not    blue: image or video    below: positions"


def draw(views: Sequence[SegmentView], titles: Sequence[str], file: Path) -> None:
    """Write the picture.

    Args:
        views: the segments, in order.
        titles: of each.
        file: of a kind that Pillow writes.
    """
    page = _Page()
    page.line(LEGEND, PALE)
    for number, (view, title) in enumerate(zip(views, titles, strict=True)):
        page.bar(
            f"segment {number}: {title}    tokens {view.start} to {view.end - 1} "
            f"({view.end - view.start}, {view.num_targets} count in the loss)"
        )
        for frames in view.media:
            num_frames, height, width, _ = frames.shape
            for frame in frames:
                largest = LARGEST_IMAGE if num_frames == 1 else LARGEST_FRAME
                page.picture(Image.fromarray(frame), largest)
            page.end_row()
            kind = "image" if num_frames == 1 else f"{num_frames} frames of a video, each"
            page.line(f"{kind} {width}x{height} pixels", PALE)
        for piece in view.pieces:
            page.piece(piece)
        page.end_row()
    page.save(file)


class _Page:
    """Grows downwards; what is put on it flows in rows."""

    def __init__(self) -> None:
        path = findfont(FontProperties(family=list(FONTS)))
        self._font = ImageFont.truetype(path, TEXT_SIZE)
        self._small = ImageFont.truetype(path, LABEL_SIZE)
        self._canvas = Image.new("RGB", (WIDTH, 1024), "white")
        self._x, self._y, self._row = MARGIN, MARGIN, 0

    def line(self, text: str, colour: str) -> None:
        x, y = self._place(WIDTH - 2 * MARGIN, TEXT_SIZE + 6)
        self._pen.text((x, y), text, colour, font=self._font)
        self.end_row()

    def bar(self, text: str) -> None:
        self._y += 2 * GAP
        x, y = self._place(WIDTH - 2 * MARGIN, TEXT_SIZE + 12)
        self._pen.rectangle((x, y, WIDTH - MARGIN, y + TEXT_SIZE + 10), fill=BAR)
        self._pen.text((x + GAP, y + GAP), text, "white", font=self._font)
        self.end_row()

    def picture(self, image: Image.Image, largest: int) -> None:
        if max(image.size) > largest:
            image.thumbnail((largest, largest))
        framed = ImageOps.expand(image, border=1, fill=PALE)
        self._canvas.paste(framed, self._place(*framed.size))

    def piece(self, piece: TextPiece) -> None:
        text = piece.text.replace(" ", "\N{MIDDLE DOT}").replace("\n", "\N{RETURN SYMBOL}")
        inner = max(self._font.getlength(text), self._small.getlength(piece.positions))
        width = min(int(inner) + 2 * GAP, WIDTH - 2 * MARGIN)
        x, y = self._place(width, LINE)
        fill = MEDIA if piece.is_media else TARGET if piece.is_target else OTHER
        self._pen.rectangle((x, y, x + width - 1, y + LINE - 1), fill=fill)
        self._pen.text((x + GAP, y + 2), text, INK, font=self._font)
        label = (x + GAP, y + LINE - LABEL_SIZE - 4)
        self._pen.text(label, piece.positions, PALE, font=self._small)
        if piece.text.endswith("\n"):
            self.end_row()

    def end_row(self) -> None:
        """What comes next begins at the left."""
        if self._row:
            self._x, self._y, self._row = MARGIN, self._y + self._row + GAP, 0

    def save(self, file: Path) -> None:
        self.end_row()
        self._canvas.crop((0, 0, WIDTH, self._y + MARGIN)).save(file)

    @property
    def _pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self._canvas)

    def _place(self, width: int, height: int) -> tuple[int, int]:
        """Room for something, in this row or the next."""
        if self._x + width > WIDTH - MARGIN:
            self.end_row()
        place = (self._x, self._y)
        self._x, self._row = self._x + width + GAP, max(self._row, height)
        needed = self._y + self._row + MARGIN
        if needed > self._canvas.height:
            taller = Image.new("RGB", (WIDTH, 2 * needed), "white")
            taller.paste(self._canvas)
            self._canvas = taller
        return place
