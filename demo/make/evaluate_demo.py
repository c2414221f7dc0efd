"""Exact-match accuracy of a demo bundle, per task, greedy.

python demo/make/evaluate_demo.py demo/bundle --seed 1 --per-task 500     # fresh pictures
python demo/make/evaluate_demo.py demo/bundle                             # the stored set, demo/eval
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lfm_runtime import Model

EVAL = Path(__file__).resolve().parents[1] / "demo" / "eval"


def questions(seed: int | None, per_task: int):
    """Yield (image, task, question, answer): newly drawn from `seed`, or the stored set where it is None."""
    if seed is None:
        for line in map(json.loads, (EVAL / "eval.jsonl").read_text().splitlines()):
            yield EVAL / line["image"], line["task"], line["question"], line["answer"]
        return
    import demo_data

    for image, asked in demo_data.evaluation_questions(seed, per_task):
        for task, question, answer in asked:
            yield image, task, question, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--variant")
    parser.add_argument("--seed", type=int, help="draw fresh pictures; without it the stored set is used")
    parser.add_argument("--per-task", type=int, default=500)
    parser.add_argument("--show-wrong", action="store_true")
    options = parser.parse_args()
    model = Model.load(options.bundle, variant=options.variant)
    right: dict[str, list[bool]] = {}
    for image, task, question, answer in questions(options.seed, options.per_task):
        said = model.answer([image], question, temperature=0).text()
        right.setdefault(task, []).append(said == answer)
        if options.show_wrong and said != answer:
            print(f"{task}: {question}  {answer!r}, said {said!r}")
    accuracy = {task: sum(found) / len(found) for task, found in sorted(right.items())}
    for task, value in accuracy.items():
        print(f"{task:10s} {value:7.1%}  of {len(right[task])}")
    print(f"{'mean':10s} {sum(accuracy.values()) / len(accuracy):7.1%}")
    print(json.dumps({"variant": model.setup.variant, "seed": options.seed, **accuracy}))


if __name__ == "__main__":
    main()
