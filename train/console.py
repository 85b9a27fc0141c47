"""What a run tells a person, on the terminal of rank 0."""

import sys

from triptych.parallel.mesh import Mesh


def say(mesh: Mesh, text: str) -> None:
    """Print on rank 0, at once: a silent log looks like a hung job."""
    if mesh.is_main:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
