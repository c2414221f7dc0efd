"""What bench.py measures: each function returns one that takes a measurement, in the unit that its name or docstring
says.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from lfm_runtime import Message, Model
from lfm_runtime.answer.reply import Job
from lfm_runtime.batch import answer_all
from lfm_runtime.decode.cache import Cache
from lfm_runtime.decode.context import Context
from lfm_runtime.decode.sampling import Sampler
from lfm_runtime.images.pixels import cut_views
from lfm_runtime.report import Report
from PIL import Image

QUESTION = "What is in this image, and where is the cup?"
# ten words and what the chat template puts around them, in the real vocabulary; a random one spells all that out
PROMPT_TOKENS = 21
PHOTO = Path(__file__).resolve().parents[2] / "demo" / "photos" / "coffee.jpg"
START = "import sys, json; from lfm_runtime import Model; m = Model.load(sys.argv[1], **json.loads(sys.argv[2]))"
ANSWER = (
    "; a = m.answer([sys.argv[3]], sys.argv[4], **json.loads(sys.argv[5])); a.text(); "
    "print(json.dumps(a.report.as_dict()))"
)
GREEDY = {"temperature": 0, "repetition_penalty": 1, "ignore_eos": True}
LABEL = """Invoice 2026-1183. Sold to: Harbour Lane Bakery, 14 Quay Street, Bremen. 12 sacks wheat flour type 550 at 18.40 euro, 3 sacks rye
flour type 1150 at 16.90 euro, 40 boxes baking paper 40 by 60 cm at 2.15 euro. Delivery on Tuesday 14 April before six in the morning, by the
yard entrance. Payment within 30 days. Goods remain ours until they are paid for."""
COPYING = {  # what a reader of documents is asked, and what it would say: quoting, rewriting, none of both
    "Write the text again, with the delivery on Thursday 16 April.": LABEL.replace("Tuesday 14", "Thursday 16"),
    (
        "Give the items as JSON."
    ): """[{"item": "wheat flour type 550", "unit": "sacks", "count": 12, "price": 18.40}, {"item": "rye flour type 1150",
"unit": "sacks", "count": 3, "price": 16.90}, {"item": "baking paper 40 by 60 cm", "unit": "boxes", "count": 40, "price": 2.15}]""",
    (
        "Who bought, and when must be paid?"
    ): """Harbour Lane Bakery, 14 Quay Street, Bremen is the buyer. The invoice says "Payment within 30 days",
and "Goods remain ours until they are paid for".""",
    "Describe the document.": """It is a bill from a mill to a bakery for several kinds of flour and some paper, with an early morning delivery
through the back of the building and a month to pay.""",
}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def paired(repeat: int, **measures: Callable[[], float]) -> dict:
    """Each measure's spread and its warm-up; `ratio`: the median over pairs of the first to the second."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeat + 1):
        for name, measure in measures.items():
            found[name].append(measure())
    row: dict = {name: {"warm_up": values[0], **spread(values[1:])} for name, values in found.items()}
    first, *others = found
    if others:
        row["ratio"] = statistics.median(a / b for a, b in zip(found[first][1:], found[others[0]][1:], strict=True))
    return row


def timed_ms(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


# ------------------------------------------------------------------------------------------------------- in process


def encode(model: Model, image: Image.Image) -> Callable[[], float]:
    """ms inside and around the vision graph, without opening and cutting the image."""
    planned = [model.open(image)]

    def measure() -> float:
        report = Report()
        model.encode(planned, report)
        return report.timing_ms["vision"] or 0.0

    return measure


def bare_encode(model: Model, image: Image.Image) -> Callable[[], float]:
    """Return a function that times the same patches in a plain session.run, in ms."""
    planned = model.open(image)
    (view,) = planned.layout.views
    (patches,) = cut_views(planned.image, planned.layout, model.setup.images)
    feeds = {
        "pixel_values": patches[None],
        "pixel_attention_mask": np.ones((1, len(patches)), np.int64),
        "spatial_shapes": np.array([[view.rows, view.columns]], np.int64),
    }
    session = model.sessions.vision()
    return lambda: timed_ms(lambda: session.run(None, feeds))


def prefill_rate(model: Model, tokens: int) -> Callable[[], float]:
    embeds = model.decoder.embed([10 + i % 300 for i in range(tokens)])

    def measure() -> float:
        state = model.decoder.start(tokens + 1)
        return tokens / timed_ms(lambda: state.step(embeds)) * 1e3

    return measure


def decode_rate(model: Model, context: int, tokens: int) -> Callable[[], float]:
    """tok/s of the runtime's whole loop: embedding, decoder, sampling, detokenising. A text prompt: one token a letter."""
    text = "a" * max(1, context - 10)

    def measure() -> float:
        answer = model.answer([], text, max_new_tokens=tokens, **GREEDY)
        answer.text()
        return answer.report.throughput["decode_tok_s"] or 0.0

    return measure


def batch_rate(model: Model, rows: int, tokens: int) -> Callable[[], float]:
    """tok/s of all answers together, eight short questions of equal length, their prompts included."""
    questions = [([], "a" * (4 + i)) for i in range(8)]

    def measure() -> float:
        taken = timed_ms(lambda: list(answer_all(model, questions, rows=rows, max_new_tokens=tokens, **GREEDY)))
        return 8 * tokens / taken * 1e3

    return measure


def copying_rate(model: Model, guesses: int) -> Callable[[], float]:
    """tok/s of an answer that copies its prompt word by word. Random weights would not: what is said is scripted, what
    it costs is not.
    """
    text = "What is in this image, and where is the cup? "
    script = model.prompts.tokenizer.encode(text)

    def measure() -> float:
        job = model.prepare_answer([Message.user(text * 2)], [], max_new_tokens=96, speculate=guesses, **GREEDY)
        report = say(model, job, [script[n % len(script)] for n in range(200)])
        assert guesses == 0 or report.accepted_tokens > 60, report
        return report.throughput["decode_tok_s"] or 0.0

    return measure


class Scripted(Sampler):
    """Says what it is told, whatever the model computes, and takes as long as a sampler does."""

    def __init__(self, settings, vocabulary: int, prompt: Sequence[int], script: Sequence[int]) -> None:
        super().__init__(settings, vocabulary, prompt)
        self._script = iter(script)

    def next(self, logits):
        super().next(logits)
        return next(self._script)


def say(model: Model, job: Job, script: Sequence[int]) -> Report:
    """Make an answer of these tokens, as the model's own loop does."""
    context = Context(model.decoder)
    logits = model.read(job, context)
    sampler = Scripted(job.settings, model.decoder.info.vocabulary, job.prompt.ids, script)
    with closing(model._tokens(job, context, sampler, sampler.next(logits))) as tokens:
        while not job.reply.finished:
            job.reply.add(next(tokens))
    job.finish()
    return job.reply.report


def pieces(text: str, vocabulary: int) -> list[int]:
    """Ids for text in pieces of up to five letters, about what the real vocabulary makes of it; the random one spells.
    The first and last ids, which are special tokens and bytes, are left out.
    """
    found = re.findall(r" ?[^\W\d]{1,5}|\d|\s|[^\w\s]", text)
    edge = vocabulary // 60
    return [edge + zlib.crc32(piece.encode()) % (vocabulary - 2 * edge) for piece in found]


def documents(model: Model, guesses: int) -> dict[str, Callable[[], float]]:
    """For each question of COPYING, and all: tok/s of its answer, scripted. Wrong guesses cost what they cost."""
    vocabulary = model.decoder.info.vocabulary

    def seconds(question: str) -> tuple[int, float]:
        script = pieces(COPYING[question], vocabulary)
        settings = {**GREEDY, "max_new_tokens": len(script), "speculate": guesses}
        job = model.prepare_answer([Message.user("")], [], **settings)
        job.prompt.ids[1:1] = pieces(f"{LABEL} {question}", vocabulary)
        report = say(model, replace(job, capacity=len(job.prompt.ids) + len(script)), script)
        tokens = len(script) - 1
        return tokens, tokens / (report.throughput["decode_tok_s"] or 1)

    def rate(questions: Sequence[str]) -> float:
        found = [seconds(q) for q in questions]
        return sum(n for n, _ in found) / sum(s for _, s in found)

    return {"all four": lambda: rate(list(COPYING)), **{q: lambda q=q: rate([q]) for q in COPYING}}


def python_ms(model: Model) -> Callable[[], float]:
    """ms a token of the decode loop that are not spent inside onnxruntime."""

    class Timed:
        def __init__(self, session) -> None:
            self.session, self.ms = session, []

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run(self, *arguments):
            start = time.perf_counter()
            out = self.session.run(*arguments)
            self.ms.append((time.perf_counter() - start) * 1e3)
            return out

        def run_with_iobinding(self, *arguments):
            start = time.perf_counter()
            self.session.run_with_iobinding(*arguments)
            self.ms.append((time.perf_counter() - start) * 1e3)

    def measure() -> float:
        sessions = model.decoder.load()
        timed = Timed(sessions.decoder), Timed(sessions.embed)
        model.decoder._sessions = type(sessions)(*timed, sessions.prefill)
        try:
            rate = decode_rate(model, 0, 49)()
        finally:
            model.decoder._sessions = sessions
        return 1e3 / rate - sum(sum(session.ms[1:]) for session in timed) / 48  # [0] is the prompt

    return measure


def question(model: Model) -> str:
    """As much of the question as makes a prompt of PROMPT_TOKENS, an image apart."""
    tokenizer, around = model.prompts.tokenizer, len(model.prompts.render([Message("user", "")], []).ids)
    return tokenizer.decode(tokenizer.encode(QUESTION)[: max(1, PROMPT_TOKENS - around)])


def first_token(model: Model, image: Image.Image) -> Callable[[], float]:
    def measure() -> float:
        answer = model.answer([image], question(model), max_new_tokens=1, **GREEDY)
        answer.text()
        return answer.report.timing_ms["ttft"] or 0.0

    return measure


def second_question(model: Model, image: Image.Image) -> Callable[[], float]:
    """The image was read with another question before, and is in the cache."""
    cache = Cache("bench")

    def measure() -> float:
        model.cache = cache
        try:
            if not cache.nbytes:
                model.answer([image], "Describe it.", max_new_tokens=1, **GREEDY).text()
            answer = model.answer([image], question(model), max_new_tokens=1, **GREEDY)
            answer.text()
        finally:
            model.cache = None
        assert answer.report.cached_tokens > answer.report.image_tokens, answer.report
        return answer.report.timing_ms["ttft"] or 0.0

    return measure


# ---------------------------------------------------------------------------------------------------- own processes


def process(bundle: str, image: Path, tokens: int, **settings) -> dict:
    """A greedy answer in a fresh process: its memory in MiB, and a hash of what it said."""
    words = [
        sys.executable,
        "-c",
        START + ANSWER,
        bundle,
        json.dumps(settings),
        str(image),
        QUESTION,
        json.dumps({**GREEDY, "max_new_tokens": tokens}),
    ]
    report = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return {
        **report["memory_mib"],
        "ttft_ms": report["timing_ms"]["ttft"],
        "text": hashlib.sha256(report["text"].encode()).hexdigest()[:12],
    }


def start_ms(bundle: str, **settings) -> Callable[[], float]:
    """A fresh interpreter until the model is loaded and the process has ended; page cache warm."""
    words = [sys.executable, "-c", START, bundle, json.dumps(settings)]
    return lambda: timed_ms(lambda: subprocess.run(words, check=True))
