"""Messages between pipeline stages: planned shapes against megatron-core's handshake.

python benchmarks/messages.py        # half a minute

Packs of unequal lengths over gloo ranks; every tensor that a rank sends in a step is counted.
"""

import tempfile
from pathlib import Path

from triptych.benchmarks.table import Row, print_rows
from triptych.tests.helpers.p2p_messages import LAYOUTS, count_messages
from triptych.tests.helpers.pool import RankPool

COMMAND = "python benchmarks/messages.py"


def main() -> list[Row]:
    """Print a line for each layout; returns a row for each."""
    rows = []
    print("| layout | messages | handshake | loss and norm |\n|---|---|---|---|")
    for number, layout in enumerate(LAYOUTS):
        with tempfile.TemporaryDirectory() as folder:
            pool = RankPool(layout.world_size, Path(folder) / str(number))
            try:
                ours = pool.run(count_messages, layout=layout, planned=True)
                theirs = pool.run(count_messages, layout=layout, planned=False)
            finally:
                pool.stop()
        sent, asked = (sum(count for _, count, *_ in ranks) for ranks in (ours, theirs))
        same = [(one[0], one[3]) for one in ours] == [(one[0], one[3]) for one in theirs]
        print(f"| {layout} | {sent} | {asked} | {'bit-equal' if same else 'DIFFER'} |")
        met = same and 2 * sent <= asked
        claim = f"messages of a step over the handshake's, {layout}"
        rows.append(Row(claim, f"{sent / asked:.2f}, same result", "<= 0.5", met, COMMAND))
    return rows


if __name__ == "__main__":
    print_rows(main())
