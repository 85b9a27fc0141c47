"""What a change must not move: losses, gradients, checkpoints, plans, as one line each.

    python benchmarks/fingerprint.py > before.txt          # in a checkout of the commit before
    python benchmarks/fingerprint.py | diff before.txt -   # in this one: no output, nothing moved

Short runs of the commands in several layouts, on two cores some four minutes. Only commands are
called, so any two commits can be compared. Moments are sums of gradients: that they are bit-equal
after six steps says so of every gradient. Left out: ``.metadata``, which has a random name in it.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

ROOT = Path(__file__).parents[1]
STEPS = "train.num_steps=6 run.checkpoint_every=3 train.validate_every=3"
RUNS = {
    "stage 1, dp2": (2, "stage=1"),
    "stage 2, one process": (1, "stage=2"),
    "stage 2, bf16": (1, "stage=2 train.precision=bf16"),
    "stage 2, tp2 with sequence parallelism": (2, "stage=2 parallel=tp2"),
    "stage 2, tp2 pp2, recomputed": (
        4,
        "stage=2 parallel=tp2_pp2 parallel.recompute.llm=full parallel.recompute.vit=full",
    ),
    "stage 3, pp2 interleaved, overlapped": (
        2,
        "stage=3 parallel=pp2 parallel.vpp=2 parallel.overlap.p2p=true "
        "parallel.overlap.grad_reduce=true parallel.overlap.param_gather=true",
    ),
    "stage 2, dp2, DeepSpeed": (2, "stage=2 optimizer.zero=deepspeed"),
}
"""Name -> ranks, and words for launch/pretrain.py."""
PLANS = (
    "stage=1 model=qwen2_vl_2b parallel=single cluster=a100 cluster.gpus=64",
    "stage=2 model=qwen2_vl_7b parallel=tp2_pp2 cluster=h100 cluster.gpus=64 "
    "parallel.overlap.tp_comm=true parallel.recompute.llm=selective",
    "stage=2 model=qwen2_vl_72b parallel=tp8_pp8 cluster=h100 cluster.gpus=1024",
    "stage=3 model=qwen2_vl_72b parallel=tp8_pp4 parallel.vpp=2 cluster=h200 cluster.gpus=512",
)


def main() -> None:
    """Print a line for each number."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (num_ranks, words) in RUNS.items():
            run_dir = Path(folder) / name.replace(" ", "_").replace(",", "")
            call(
                f"torchrun --standalone --nproc-per-node {num_ranks} launch/pretrain.py {words} "
                f"{STEPS} run.dir={run_dir} data.root={folder}/data"
            )
            for line in run_lines(run_dir):
                print(f"{name}: {line}", flush=True)
        exported = Path(folder) / "exported"
        source = Path(folder) / "stage_2_one_process"
        tokenizer = f"{folder}/data/tokenizer"
        call(f"python launch/convert.py export {source} {exported} --tokenizer {tokenizer}")
        for file in sorted(exported.iterdir()):
            content = file.read_bytes().replace(folder.encode(), b"")  # as the model card names it
            print(f"export: {file.name} {digest(content)}")
    for words in PLANS:
        print(f"plan.py {words}: {digest(call(f'python launch/plan.py {words}').encode())}")


def run_lines(run_dir: Path) -> Iterator[str]:
    """What a run left behind: every step, and every file of its checkpoints."""
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        kept = (
            "step",
            "loss",
            "grad_norm",
            "num_tokens",
            "num_patches",
            "flops",
            "validation_loss",
        )
        yield " ".join(f"{key}={step[key]!r}" for key in kept if key in step)
    for checkpoint in sorted((run_dir / "checkpoints").glob("step_*")):
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
        yield f"{checkpoint.name} plan {manifest['info']['plan']}"
        for file in sorted(manifest["files"]):
            is_shard = file.startswith("shards/") and not file.endswith(".metadata")
            if is_shard or file in ("data.json", "model.json"):
                yield f"{checkpoint.name} {file} {manifest['files'][file]['xxh3_128']}"
    for ledger in sorted((run_dir / "ledger").iterdir()):
        yield f"ledger {ledger.name} {digest(ledger.read_bytes())}"


def digest(content: bytes) -> str:
    """xxh3-128, in hex."""
    return xxhash.xxh3_128_hexdigest(content)


def call(command: str) -> str:
    """Run a command of this project; returns its output, and ends with it where it fails."""
    program, *words = shlex.split(command)
    done = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *words],
        cwd=ROOT,
        env={"PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
