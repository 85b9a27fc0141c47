"""What `--help` prints: the groups with their choices, and the overrides that people type."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

OVERRIDES = {
    "stage": "1, 2, 3 or warmup: what trains, token budget, learning rates",
    "model": "sizes of ViT and language model",
    "data": "dataset folders and their mixture in each stage; your own with --config-dir",
    "parallel.tp": "tensor parallelism",
    "parallel.pp": "pipeline parallelism; data parallelism is what is left of the ranks",
    "parallel.vpp": "model chunks per pipeline stage: interleaved 1F1B",
    "parallel.sequence_parallel": "shard norms and residuals over the tp ranks",
    "parallel.layout": "decoder layers of each pipeline stage, as [9,10,10,11], or auto",
    "parallel.recompute.vit": "none or full",
    "parallel.recompute.llm": "none, selective or full",
    "parallel.overlap.grad_reduce": "gradients travel during the backward pass",
    "parallel.overlap.param_gather": "weights travel during the next forward pass",
    "parallel.overlap.p2p": "messages between stages travel during other passes; needs vpp > 1",
    "parallel.overlap.tp_comm": "tp ranks exchange activations during their matrix products",
    "train.kernels": "auto takes fused kernels where they are installed, torch never",
    "train.deterministic": "the same bits each time on CUDA, by slower kernels",
    "cluster": "what the machines can do: for launch/plan.py, MFU, the split of layers",
    "optimizer.zero": "who shards the optimizer state over data-parallel ranks",
    "train.precision": "fp32 or bf16",
    "train.num_steps": "caps the stage, which otherwise ends at its token budget",
    "stage.horizon": "what learning rates follow: budget, or run, which ends with train.num_steps",
    "train.global_batch_size": "packs per step",
    "train.micro_batch_size": "packs that go through the model together",
    "train.seq_len": "tokens per pack",
    "train.validate_every": "steps between validation losses",
    "data.max_pixels": "larger images are reduced to this",
    "data.video.max_tokens": "longer videos are looked at in smaller frames",
    "init.checkpoint": "the weights to start from: a run, a checkpoint or a converted model",
    "init.language": "a Qwen2 or Qwen2.5 text model to start from, with init.vision",
    "init.vision": "a CLIP ViT, or a Qwen2-VL or Qwen2.5-VL model for its ViT, to start from",
    "init.allow_random": "start from random weights on purpose",
    "run.dir": "where logs and checkpoints go",
    "run.checkpoint_every": "steps between checkpoints",
    "run.weights_every": "steps between checkpoints of weights only, all kept",
    "resume": "auto, never, or the checkpoint to go on from",
    "seed": "random weights, order and mixture of the data",
}
"""Key -> what it sets, in the order of the table in docs/configuration.md."""


def usage(choices: Mapping[str, Sequence[str]], defaults: Mapping[str, str]) -> str:
    """The text of `--help`.

    Args:
        choices: group -> its choices.
        defaults: group -> the choice that is taken when none is given.
    """
    groups = [
        f"  {group:<10} "
        + "  ".join(f"[{name}]" if name == defaults[group] else name for name in names)
        for group, names in choices.items()
    ]
    width = max(map(len, OVERRIDES))
    keys = [f"  {key:<{width}}  {meaning}" for key, meaning in OVERRIDES.items()]
    return "\n".join(
        [
            f"usage: {Path(sys.argv[0]).name} [GROUP=CHOICE ...] [KEY=VALUE ...] [options]",
            "",
            "Groups, and the choice taken when none is given in [brackets]:",
            *groups,
            "",
            "Keys that are often set (--print-config shows all of them):",
            *keys,
            "",
            "Options:",
            "  --config-dir DIR  also look for choices in DIR/data/*.yaml, DIR/model/*.yaml, ...;",
            "                    may be given several times",
            "  --print-config    print the whole configuration and exit",
            "  --help            print this and exit",
            "",
        ]
    )
