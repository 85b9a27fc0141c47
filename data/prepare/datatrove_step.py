"""Prepares a dataset by datatrove's executors: on this machine, by Slurm arrays, by Ray.

    step = PrepareStep([Path("chats.jsonl")], Path("datasets/chats"), Path("Qwen2-VL-7B"))
    parts = LocalPipelineExecutor([step], tasks=64, logging_dir="logs/parts")
    LocalPipelineExecutor([step], tasks=1, logging_dir="logs/whole", depends=parts).run()

Such a step is any callable, so nothing of datatrove is needed here.
"""

from pathlib import Path
from typing import Any

from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import load_tokenizer


class PrepareStep:
    """Task i of n prepares the i-th share of the blocks; one task alone puts all together.

    What a task has finished is there after it was killed, so it may be started again.
    """

    def __init__(self, inputs: list[Path], output: Path, tokenizer: Path, **options: Any) -> None:
        """Reads nothing yet: it travels to the tasks.

        Args:
            inputs: as ``build_dataset`` takes them; all tasks see them, and ``output``, by these
                paths.
            output: the dataset folder.
            tokenizer: folder of a Hugging Face tokenizer.
            options: of ``build_dataset``; ``images`` is the folder of the first input without.
        """
        self._inputs, self._output, self._tokenizer = inputs, output, tokenizer
        self._options = {"images": [inputs[0].parent], **options}

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """What datatrove calls in each task; ``rank`` counts from 0.

        Raises:
            ConfigError: there is no such tokenizer.
            DataError: as ``build_dataset`` does.
        """
        build_dataset(
            self._inputs,
            self._output,
            load_tokenizer(self._tokenizer),
            part=(rank + 1, world_size),
            **self._options,
        )
