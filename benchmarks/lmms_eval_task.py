r"""The demo's unseen pictures as a task of lmms-eval, and its answers against ours.

    python benchmarks/lmms_eval_task.py make FOLDER     # 400 pictures; then, in the harness's venv:
    python -m lmms_eval --model qwen2_vl --model_args pretrained=EXPORTED,device=cpu,... \
        --tasks triptych_digits --include_path FOLDER --log_samples --output_path FOLDER/out
    python benchmarks/lmms_eval_task.py compare FOLDER/out runs/demo/evaluation.json

docs/evaluation.md has the whole command. Exits with 1 where an answer is not ours.
"""

import argparse
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from triptych.data.digits.images import heldout_images
from triptych.data.digits.texts import READ
from triptych.launch.digits.evaluate import MAX_NEW_TOKENS, encode, load_readings

TASK = """\
task: triptych_digits
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/test.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function triptych_digits.doc_to_visual
doc_to_text: !function triptych_digits.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
process_results: !function triptych_digits.process_results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """\
import io

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


def main() -> None:
    """Write the task, or compare its samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make")
    made.add_argument("folder", type=Path)
    made.add_argument("--digits", type=int, default=400, help="pictures (default: 400)")
    made.add_argument("--seed", type=int, default=1234, help="of these (default: 1234)")
    compared = commands.add_parser("compare")
    compared.add_argument("output", type=Path, help="lmms-eval's --output_path")
    compared.add_argument("readings", type=Path, help="evaluation.json of launch/sample.py")
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, options.digits, options.seed)
    else:
        compare(options.output, options.readings)


def make(folder: Path, num_pictures: int, seed: int) -> None:
    """Write data, task and its functions."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = list(heldout_images(num_pictures, seed))
    columns = {
        "image": [encode(picture.image) for picture in pictures],
        "question": [READ] * num_pictures,
        "answer": [picture.answer for picture in pictures],
    }
    pq.write_table(pa.table(columns), folder / "test.parquet")
    task = TASK.format(folder=folder.resolve(), max_new_tokens=MAX_NEW_TOKENS)
    (folder / "triptych_digits.yaml").write_text(task)
    (folder / "triptych_digits.py").write_text(FUNCTIONS)


def compare(output: Path, readings: Path) -> None:
    """Answer by answer, and the score."""
    ours = load_readings(readings.parent)
    newest = max(output.rglob("*samples*.jsonl"), key=lambda path: path.stat().st_mtime)
    samples = [json.loads(line) for line in newest.read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == list(range(len(ours))), "other pictures"
    same = sum(
        sample["filtered_resps"].strip() == reading.answer.strip()
        for sample, reading in zip(samples, ours, strict=True)
    )
    theirs = sum(sample["exact"] for sample in samples) / len(samples)
    here = sum(reading.is_right for reading in ours) / len(ours)
    print(f"lmms-eval {theirs:.4f}, here {here:.4f}; {same} of {len(ours)} answers are the same")
    sys.exit(0 if same == len(ours) else 1)


if __name__ == "__main__":
    main()
