"""What a second process brings to preparing: ``python benchmarks/preparing.py --folder FOLDER``.

Caption pairs with a JPEG of 448x448 each, by one process and by two, in turn, in FOLDER. Prints
samples per second of wall time, so it says something on an idle machine only.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.benchmarks.noisy_picture import picture
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import train_tokenizer

NUM_SAMPLES, NUM_BLOCKS, SIDE, ROUNDS = 6000, 24, 448, 3


def main() -> None:
    """Measure, and print one line."""
    options = parser_with_folder(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, rng = Path(name), np.random.default_rng(0)
        for number in range(20):
            picture(rng, SIDE, SIDE).save(folder / f"{number}.jpg", quality=90)
        pairs = [{"image": f"{i % 20}.jpg", "text": f"picture {i}"} for i in range(NUM_SAMPLES)]
        lines = [json.dumps(pair) + "\n" for pair in pairs]
        (folder / "pairs.jsonl").write_text("".join(lines))
        tokenizer = train_tokenizer(["picture 1 2 3"], folder / "tokenizer", 300)
        rates: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(ROUNDS):
            for num_processes, rate in rates.items():
                started = time.monotonic()
                build_dataset(
                    [folder / "pairs.jsonl"],
                    folder / f"set_{turn}_{num_processes}",
                    tokenizer,
                    images=[folder],
                    block_size=sum(map(len, lines)) // NUM_BLOCKS,
                    num_processes=num_processes,
                )
                rate.append(NUM_SAMPLES / (time.monotonic() - started))
        one, two = (statistics.median(rate) for rate in rates.values())
        ratios = sorted(b / a for a, b in zip(*rates.values(), strict=True))
        print(
            f"prepared by one process {one:,.0f} samples/s, by two {two:,.0f}: "
            f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
