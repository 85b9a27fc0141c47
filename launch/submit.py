r"""Check a run as a whole, then submit it to Slurm, as one job or as a chain of jobs.

    python launch/submit.py --nodes 8 --gpus-per-node 8 --time 1-00:00:00 --jobs 7 \
        --sbatch=--account=vision -- stage=2 model=qwen2_vl_7b parallel=tp2_pp2 run.dir=...

Everything after -- goes to launch/pretrain.py. A mistake in it is told now, not when the job
starts. Before its time ends, a job saves; it is then requeued, or the next of its chain goes on.
docs/slurm.md has the details.
"""

import argparse
import hashlib
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.configs.validate import validate
from triptych.errors import ConfigError
from triptych.launch.cli import at_least_one, run

JOB = "launch/slurm/pretrain.sbatch"


def main(argv: Sequence[str]) -> None:
    """Validate, submit, tell.

    Raises:
        ConfigError: the run cannot be, or Slurm does not take it.
    """
    options = _parser().parse_args(argv)
    config = load_config(options.words)
    if not Path(JOB).is_file():
        raise ConfigError(f"there is no {JOB} in {Path.cwd()}  -> submit from the project's root")
    validate(config, world_size=options.nodes * (options.gpus_per_node or options.processes))
    previous = ""
    for number in range(1, options.jobs + 1):
        command = sbatch_command(options, config, previous)
        if options.dry_run:
            print(shlex.join(command))
            previous = f"JOB_{number}"
            continue
        previous = _submit(command)
        print(f"job {previous}" + (f", {number} of {options.jobs}" if options.jobs > 1 else ""))
    name = job_name(config)
    print(f"-> squeue --name={name}; scancel --name={name} ends all of it")


def sbatch_command(options: argparse.Namespace, config: Config, previous: str) -> list[str]:
    """What to type for one job; ``previous`` is the job after which it comes, if any."""
    gpus = [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []
    processes = [] if options.gpus_per_node else [f",NPROC_PER_NODE={options.processes}"]
    return [
        "sbatch",
        "--parsable",
        f"--nodes={options.nodes}",
        *gpus,
        f"--time={options.time}",
        f"--job-name={job_name(config)}",
        f"--signal=B:USR1@{options.notice_s}",
        f"--export=ALL,TRIPTYCH_CHAIN={int(options.jobs > 1)}" + "".join(processes),
        *([f"--dependency=afterany:{previous}"] if previous else []),
        *options.sbatch,
        JOB,
        *options.words,
    ]


def job_name(config: Config) -> str:
    """One name for all jobs of a ``run.dir``: by it a chain is ended."""
    run_dir = str(Path(config.run.dir).resolve())
    return f"{config.stage.name}-{hashlib.sha256(run_dir.encode()).hexdigest()[:8]}"


def _submit(command: Sequence[str]) -> str:
    """The job's number."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise ConfigError("there is no sbatch here  -> submit from a login node") from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"{shlex.join(command)}\n{error.stderr.strip()}\n  -> change what Slurm refuses; "
            "squeue --me shows what of the chain was taken"
        ) from error
    return ended.stdout.strip().partition(";")[0]  # a cluster's name may follow


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nodes", type=at_least_one, required=True)
    add("--gpus-per-node", type=at_least_one, help="none: on CPUs")
    add(
        "--processes",
        type=at_least_one,
        default=1,
        help="per node, where there are no GPUs (default: 1)",
    )
    add("--time", required=True, help="of one job, as sbatch takes it: 1-00:00:00")
    add("--jobs", type=at_least_one, default=1, help="a chain, each going on from the one before")
    add(
        "--notice-s",
        type=at_least_one,
        default=300,
        help="before its time ends a job saves (default: 300)",
    )
    add("--sbatch", action="append", default=[], metavar="=OPTION", help="more, as they are")
    add("--dry-run", action="store_true", help="print the commands, submit nothing")
    add("words", nargs="*", help="the command line of launch/pretrain.py, after --")
    return parser


if __name__ == "__main__":
    run(main)
