r"""Train one stage.

    torchrun launch/pretrain.py stage=2      # one process, small model, sample data
    torchrun --nproc-per-node 8 launch/pretrain.py stage=1 model=qwen2_vl_7b parallel=tp2_pp2 \
        --config-dir mine data=my_mixture init.checkpoint=runs/imported
    python launch/pretrain.py --help         # groups, choices, overrides

Typed again, it resumes where it stopped, or says that it is finished.
"""

import os
import sys
from collections.abc import Sequence

try:
    from triptych.configs.compose import load_config
    from triptych.configs.validate import validate
    from triptych.launch.cli import long_import, run
except ModuleNotFoundError as missing:
    if missing.name not in ("triptych", "hydra", "omegaconf"):
        raise
    sys.exit(
        f"{missing.name} is not installed for {sys.executable}\n"
        "  -> make install && source .venv/bin/activate, or: pip install -e . -c constraints.txt"
    )


def main(argv: Sequence[str]) -> None:
    """Compose, validate, train."""
    config = load_config(argv)
    validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    with long_import():  # late: --help and refusals do not pay for torch
        from triptych.train.run import leave, pretrain

    pretrain(config)
    leave()


if __name__ == "__main__":
    run(main)
