"""Every benchmark of this folder, one after the other, as Markdown. This is ``make bench``."""

import os
import platform
import runpy
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", flush=True)
    for script in sorted(HERE.glob("*.py")):
        if script.name != Path(__file__).name:
            print(f"\n## {script.stem}\n", flush=True)
            runpy.run_path(str(script), run_name="__main__")
