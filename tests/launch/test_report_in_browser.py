"""The page of a run in a browser: readable on a screen and on a telephone, light and dark."""

from pathlib import Path

import pytest

from triptych.launch.report import main
from triptych.tests.helpers.browser import browser, find_browser
from triptych.tests.helpers.left_by_a_run import leave_run

SMALLEST_PX = 12

WIDER_THAN_THE_PAGE = """
[...document.querySelectorAll("main > *, .card, figure, .frame")]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 99))
"""
SMALLEST_FONT = """
Math.min(...[...document.querySelectorAll("main *")].filter(e => e.innerText)
  .map(e => parseFloat(getComputedStyle(e).fontSize)))
"""
TOUCHING_TICKS = """
[...document.querySelectorAll(".frame")].flatMap(frame => ["b.x", "b.y"].flatMap(kind => {
  const boxes = [...frame.querySelectorAll(kind)].map(e => e.getBoundingClientRect());
  return boxes.slice(1).map((box, i) => [boxes[i], box]).filter(([a, b]) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom);
})).length
"""
LOST_PICTURES = "[...document.images].filter(i => !i.naturalWidth || !i.clientWidth).length"
CONTRAST = """
(() => {
  const light = text => { const [r, g, b] = getComputedStyle(document.body)[text].match(/\\d+/g);
    return (0.21 * r + 0.72 * g + 0.07 * b) / 255; };
  return Math.abs(light("color") - light("backgroundColor"));
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    """Of one run; of a folder of three stages; of two runs that are compared; of an empty one."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "one": [leave_run(folder / "one", num_steps=2000)],
        "stages": [
            leave_run(folder / "all" / stage, num_steps=120, stage=stage).parent
            for stage in ("stage1", "stage2", "stage3")
        ],
        "compared": [leave_run(folder / f"lr_{lr}", num_steps=120, lr=lr) for lr in "12"],
        "empty": [folder / "a_folder_with_a_name_of_sixty_characters_and_no_space_in_it"],
    }
    runs["empty"][0].mkdir()
    for name, folders in runs.items():
        main([*map(str, folders), "--output", str(folder / f"{name}.html")])
    return [folder / f"{name}.html" for name in runs]


def test_pages_are_readable_at_any_width(pages, tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip("needs a browser: apt-get install --no-install-recommends chromium")
    with browser(program, tmp_path) as opened:
        for page in pages:
            for width, dark in ((1280, False), (400, True)):
                opened.open(page, width=width, dark=dark)
                where = f"{page.name} at {width}"
                assert opened.value("document.documentElement.scrollWidth") == width, where
                assert opened.value(WIDER_THAN_THE_PAGE) == [], where
                assert opened.value(SMALLEST_FONT) >= SMALLEST_PX, where
                assert opened.value(TOUCHING_TICKS) == 0, where
                assert opened.value(LOST_PICTURES) == 0, where
                assert opened.value(CONTRAST) > 0.7, where
                assert opened.value("matchMedia('(prefers-color-scheme: dark)').matches") == dark
                assert opened.complaints == [], where
