r"""Held-out digits as tasks of lmms-eval, and its answers against ours.

    python benchmarks/lmms_eval_task.py make FOLDER     # then, in the harness's own environment:
    python -m lmms_eval --model qwen2_vl --model_args pretrained=EXPORTED,device=cpu,... \
        --tasks triptych_pictures,triptych_videos,triptych_texts --include_path FOLDER \
        --log_samples --output_path FOLDER/out
    python benchmarks/lmms_eval_task.py compare FOLDER runs/demo/stage3 runs/demo/export

docs/evaluation.md has the whole command. The pictures are those of launch/sample.py --digits; the
videos show such pictures moving; the texts are questions about digits among points. lmms-eval sends
pictures through JPEG: they are asked about here as it sends them, and as they are. Of a video it
takes other frames than transformers and we do, and has one limit for frames and pictures: these
videos have as many frames as both want, of a size that nobody changes. Exits with 1 where an answer
to the same pixels is not ours.
"""

import argparse
import io
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageChops

from triptych.configs.schema import Precision
from triptych.data.digits.images import DigitImage, heldout_images
from triptych.data.digits.texts import READ, sketch
from triptych.data.types import MediaKind
from triptych.launch.digits.evaluate import MAX_NEW_TOKENS, encode
from triptych.launch.inference.answering import Answerer, Question

KINDS = ("picture", "video", "text")
FACTOR = 28
"""Pixels along a side of a token."""
MAX_TOKENS = 16
"""In a frame: the demo's limit for pictures, which lmms-eval is given for frames too."""
NUM_FRAMES, FRAMES_PER_SECOND = 4, 2
JPEG_QUALITY = 85
"""Of lmms-eval's qwen2_vl."""
TASK = """\
task: triptych_{kind}s
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/{kind}s.parquet
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
from PIL import Image


def doc_to_visual(doc):
    if not doc["file"]:
        return []
    if doc["file"].endswith(".mp4"):
        return [doc["file"]]
    return [Image.open(doc["file"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


def main() -> None:
    """Write the tasks, or compare their samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make")
    made.add_argument("folder", type=Path)
    for kind, number in zip(KINDS, (400, 50, 50), strict=True):
        made.add_argument(f"--{kind}s", type=int, default=number, help=f"(default: {number})")
    made.add_argument("--seed", type=int, default=1234, help="of the pictures (default: 1234)")
    compared = commands.add_parser("compare")
    compared.add_argument("folder", type=Path, help="of make; lmms-eval wrote to its out/")
    compared.add_argument("checkpoint", type=Path)
    compared.add_argument("exported", type=Path)
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, vars(options))
    else:
        compare(options.folder, options.checkpoint, options.exported)


def make(folder: Path, numbers: dict[str, int]) -> None:
    """Write data, tasks and their functions."""
    media = folder.resolve() / "media"
    media.mkdir(parents=True)
    (folder / "triptych_digits.py").write_text(FUNCTIONS)
    rows: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for kind, number, picture in shown(numbers):
        file = media / f"{kind}_{number}.{'png' if kind == 'picture' else 'mp4'}"
        file.write_bytes(encode(picture.image) if kind == "picture" else video_of(picture))
        rows[kind].append({"file": str(file), "question": READ, "answer": picture.answer})
    rng = random.Random(numbers["seed"])
    for number in range(numbers["texts"]):
        drawn = sketch(rng, 1 + number % 2)
        question = f"{drawn.part['text']}{READ}"
        rows["text"].append({"file": "", "question": question, "answer": drawn.digits})
    for kind in KINDS:
        pq.write_table(pa.Table.from_pylist(rows[kind]), folder / f"{kind}s.parquet")
        task = TASK.format(folder=folder.resolve(), kind=kind, max_new_tokens=MAX_NEW_TOKENS)
        (folder / f"triptych_{kind}s.yaml").write_text(task)


def shown(numbers: dict[str, int]) -> Iterator[tuple[str, int, DigitImage]]:
    """Kind, number and content of each picture and video."""
    num_pictures, num_videos = numbers["pictures"], numbers["videos"]
    drawn = list(heldout_images(num_pictures + 2 * num_videos, numbers["seed"]))
    for number, picture in enumerate(drawn[:num_pictures]):
        yield "picture", number, picture
    small = [each for each in drawn[num_pictures:] if prod(tokens_of(each)) <= MAX_TOKENS]
    for number, picture in enumerate(small[:num_videos]):
        yield "video", number, picture


def tokens_of(picture: DigitImage) -> tuple[int, int]:
    """Along both sides, width first."""
    width, height = (max(1, round(side / FACTOR)) for side in picture.image.size)
    return width, height


def video_of(picture: DigitImage) -> bytes:
    """An MP4 of the picture, at the nearest whole number of tokens, going to the right."""
    width, height = (FACTOR * number for number in tokens_of(picture))
    first = picture.image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(NUM_FRAMES):
            moved = np.asarray(ImageChops.offset(first, 2 * number, 0))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def compare(folder: Path, checkpoint: Path, exported: Path) -> None:
    """Answer by answer, and the scores, a row for each task."""
    ours = Answerer.load(checkpoint, exported, Precision.fp32)
    all_same = True
    for kind in KINDS:
        rows = pq.read_table(folder / f"{kind}s.parquet").to_pylist()
        samples = newest_samples(folder / "out", f"triptych_{kind}s")
        assert [sample["doc_id"] for sample in samples] == list(range(len(rows))), "other questions"
        theirs = [text_of(sample) for sample in samples]
        asked = list(questions(kind, rows))
        if kind == "picture":
            report("pictures as they are", rows, theirs, ours, asked)
            asked = [replace(each, file=as_jpeg(each.file)) for each in asked]
        all_same &= report(f"{kind}s", rows, theirs, ours, asked)
    sys.exit(0 if all_same else 1)


def report(
    told: str,
    rows: list[dict[str, str]],
    theirs: list[str],
    answerer: Answerer,
    asked: list[Question],
) -> bool:
    """Print both scores, and how many answers are the same; whether all are."""
    ours = [text.strip() for text in answerer.read(asked, max_new_tokens=MAX_NEW_TOKENS)]
    scores = [
        sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) / len(rows)
        for answers in (theirs, ours)
    ]
    same = sum(one == other for one, other in zip(theirs, ours, strict=True))
    print(
        f"{told}: lmms-eval {scores[0]:.4f}, here {scores[1]:.4f}; "
        f"{same} of {len(rows)} answers are the same"
    )
    return same == len(rows)


def questions(kind: str, rows: list[dict[str, str]]) -> Iterator[Question]:
    """As they are asked here."""
    media_kind = MediaKind.VIDEO if kind == "video" else MediaKind.IMAGE
    for row in rows:
        file = Path(row["file"]).read_bytes() if row["file"] else None
        yield Question(file, row["question"], row["file"] or kind, media_kind)


def as_jpeg(file: bytes | None) -> bytes:
    """The picture as lmms-eval sends it."""
    assert file is not None
    buffer = io.BytesIO()
    Image.open(io.BytesIO(file)).convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def newest_samples(output: Path, task: str) -> list[dict[str, object]]:
    """What lmms-eval logged last of a task, by number of the question."""
    logs = output.rglob(f"*samples_{task}.jsonl")
    newest = max(logs, key=lambda path: path.stat().st_mtime)
    samples = [json.loads(line) for line in newest.read_text().splitlines()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def text_of(sample: dict[str, object]) -> str:
    """The answer that lmms-eval scored."""
    answer = sample["filtered_resps"]
    return str(answer[0] if isinstance(answer, list) else answer).strip()


if __name__ == "__main__":
    main()
