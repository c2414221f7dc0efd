"""Reads audit.json, a file that somebody else may have damaged or edited."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lfm_runtime.errors import EdgeError
from lfm_runtime.formats.files import DIGEST, check_digest, read_json_object
from lfm_runtime.formats.typed import read_as

from lfm_audit.figures import Figure
from lfm_audit.result import SCHEMA, TOOL, Answers, Audit
from lfm_audit.summary import STAGES
from lfm_audit.verdict import judged_again

_READ = (1, 2, SCHEMA)
_ROUNDING = 1.1e-3
_STAGES_MS = 0.02
"""Of a sum of stages, each rounded to a ten-thousandth."""
_AGAIN = "make the audit again"


class AuditError(EdgeError, ValueError):
    """A file is not an audit that can be read here."""


def read_audit(path: Path) -> Audit:
    """Read a file of an audit. Its verdict and limits are judged again from its figures; only what no figure shows (the
    clock, files that were changed) is taken from the file.

    Raises:
        AuditError: missing, cut off, edited (figures that disagree with their samples or with each other), or of
            another schema.
    """
    raw = read_json_object(path, AuditError, advice=f"name a file written by {TOOL}")
    tool = raw.get("tool")
    if not (isinstance(tool, dict) and tool.get("name") == TOOL):
        raise AuditError(f"{path} is not an audit; name a file written by {TOOL} -o")
    if (schema := raw.get("schema")) not in _READ or isinstance(schema, bool):
        raise AuditError(
            f"{path} is an audit of schema {json.dumps(schema)[:20]}, this lfm-edge reads {SCHEMA}; {_AGAIN}"
        )
    if schema > 1 and DIGEST not in raw:
        raise AuditError(f"{path} was edited: it has no {DIGEST}; {_AGAIN}")
    check_digest(raw, path, AuditError, _AGAIN)
    found = read_as(Audit, raw, path, AuditError, _AGAIN)
    if not found.variants or any(not variant.images for variant in found.variants.values()):
        raise AuditError(f"{path} has a variant without figures, or none; {_AGAIN}")
    if not all(map(_agrees, _figures(found))):
        raise AuditError(f"{path} was edited: a figure does not agree with its samples; {_AGAIN}")
    for name, variant in found.variants.items():
        for image, answers in variant.images.items():
            if not _adds_up(answers):
                raise AuditError(f"{path} was edited: the stages of {name}, {image} are not its total; {_AGAIN}")
            if not _counts_agree(answers):
                raise AuditError(f"{path} was edited: the tokens of {name}, {image} do not agree; {_AGAIN}")
    return judged_again(found)


def _figures(value: Any) -> Iterator[Figure]:
    """Every figure, wherever it stands."""
    if isinstance(value, Figure):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _figures(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _figures(inner)


def _agrees(figure: Figure) -> bool:
    """Whether a figure agrees with its samples, up to the rounding of written audits."""
    if not figure.samples:
        return False
    computed = Figure.of(figure.samples)
    pairs = [(getattr(computed, f.name), getattr(figure, f.name)) for f in dataclasses.fields(Figure)]
    return all(
        a is b if a is None or b is None else abs(a - b) <= _ROUNDING * (1 + abs(a))
        for a, b in pairs
        if not isinstance(a, tuple)
    )


def _adds_up(answers: Answers) -> bool:
    """Whether the stages of every answer add up to its total, and those before the first token take no longer than it
    took.
    """
    stages = dict(answers.stages.items())
    totals, firsts = answers.total_ms.samples, answers.ttft_ms.samples
    if any(len(of.samples) != len(totals) for of in (*stages.values(), answers.ttft_ms)):
        return False
    before = [stages[f"{name}_ms"].samples for name in STAGES]
    return all(
        abs(sum(of.samples[n] for of in stages.values()) - total) <= _STAGES_MS
        and sum(of[n] for of in before) <= first + _STAGES_MS
        and first <= total + _STAGES_MS
        for n, (first, total) in enumerate(zip(firsts, totals, strict=True))
    )


def _counts_agree(answers: Answers) -> bool:
    """Whether the rates are those of the numbers of tokens."""
    decoded, prompt = answers.new_tokens - 1, answers.prompt_tokens
    if (answers.inter_token_ms is None) != (decoded < 1) or (answers.decode_tok_s is None) != (decoded < 1):
        return False
    if answers.inter_token_ms and answers.inter_token_ms.n != decoded * answers.total_ms.n:
        return False
    rates, times = answers.prefill_tok_s.samples, answers.stages.prefill_ms.samples
    if len(rates) != len(times):  # a clock that stood still gives no rate
        return min(times) <= 0
    return all(
        abs(rate * ms - prompt * 1e3) <= _ROUNDING * (1 + rate + ms + prompt * 1e3)
        for rate, ms in zip(rates, times, strict=True)
        if ms > 0
    )


def is_audit(path: Path) -> bool:
    """True: lfm-edge audit wrote this file, and nobody edited it since; else AuditError, as `read_audit`."""
    read_audit(path)
    return True
