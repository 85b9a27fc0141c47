r"""The weights of a checkpoint, loaded and saved again by the ranks of a layout; no training.

    torchrun --nproc-per-node 4 benchmarks/saved_by_layout.py --tp 2 --pp 2 FROM TO TOKENIZER

What ``run.weights_every`` of a run in that layout leaves, without optimizer state in memory.
"""

import argparse
from pathlib import Path

from triptych.checkpoints.layout import CHECKPOINTS
from triptych.checkpoints.model_file import write_model
from triptych.checkpoints.run_state import RunTensors, weights_to_save
from triptych.checkpoints.shard_file import write_streamed
from triptych.checkpoints.store import CheckpointStore
from triptych.launch.inference.answering import Answerer
from triptych.models.parameters import global_parameters
from triptych.models.qwen_vl.sharding_table import sharding_table


def main() -> None:
    """Load, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--pp", type=int, required=True)
    for name in ("source", "output", "tokenizer"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    model = Answerer.load(options.source, options.tokenizer, tp=options.tp, pp=options.pp)
    mesh, sharding = model.mesh, sharding_table(model.config)
    run = RunTensors(dict(global_parameters(model.chunks)), None, sharding, mesh)
    writer = CheckpointStore(options.output / CHECKPOINTS, mesh.world).begin(1)
    write_streamed(writer.folder.shards, weights_to_save(run), mesh, sharding)
    if mesh.is_main:
        write_model(writer.folder.model, model.config)
    writer.commit({"stage": "imported"})


if __name__ == "__main__":
    main()
