"""Plots as SVG, for a page: matplotlib draws them. Colours are Okabe and Ito's, which colour-blind readers can tell
apart; in print, hatches and markers do.
"""

from __future__ import annotations

import functools
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lfm_audit.report.source import Named, Series, images_of
from lfm_audit.result import BackgroundAt, MachineAt
from lfm_audit.tune.result import TuningResult
from lfm_audit.verdict import MOST_BACKGROUND

ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE, BLACK = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#000000",
)
STAGES = {
    "image_ms": ("decode image", YELLOW, ".."),
    "prompt_ms": ("prompt", "#777777", "--"),
    "preprocess_ms": ("preprocess", ORANGE, ""),
    "load_ms": ("load graphs", RED, "++"),
    "vision_ms": ("vision", BLUE, "//"),
    "embed_ms": ("embed", BLACK, ""),
    "prefill_ms": ("prefill", SKY, "\\\\"),
    "decode_ms": ("decode", GREEN, ""),
    "detokenize_ms": ("detokenize", PURPLE, ""),
    "other_ms": ("other", "#bbbbbb", "xx"),
}
_LINES = (
    (BLUE, "o", "-"),
    (RED, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (ORANGE, "v", "-"),
    (BLACK, "x", "--"),
)
_WIDTH = 8.6
_Given = ParamSpec("_Given")
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "hatch.linewidth": 0.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "svg.hashsalt": "lfm-edge",
    "text.parse_math": False,
}


def _styled(draw: Callable[_Given, str]) -> Callable[_Given, str]:
    """A plot in our style; nothing of matplotlib's own settings is changed for others."""

    @functools.wraps(draw)
    def drawn(*args: _Given.args, **kwargs: _Given.kwargs) -> str:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


@_styled
def waterfall(series: Sequence[Series]) -> str:
    """Where the time of an answer goes: a row of stages for each series, a panel for each image, one scale for all. The
    answer drawn is the one whose total is the median, so that its stages add up.
    """
    images = images_of(series)
    figure, axes = _panels(len(images), 0.5 + 0.34 * len(series))
    longest = max(one.result.images[name].total_ms.median for one in series for name in one.result.images)
    for axis, name in zip(axes, images, strict=True):
        there = [one for one in series if name in one.result.images]
        for row, one in enumerate(there):
            found, left = one.result.images[name], 0.0
            middle = found.total_ms.samples.index(sorted(found.total_ms.samples)[(found.total_ms.n - 1) // 2])
            for key, (label, colour, hatch) in STAGES.items():
                ms = getattr(found.stages, key).samples[middle]
                _part(axis, row, left, ms, (label, colour, hatch))
                left += ms
            first = found.ttft_ms.samples[middle]
            axis.plot(
                [first, first], [row - 0.42, row + 0.42], color=BLACK, linewidth=1.6, label="" if row else "first token"
            )
            axis.text(left, row, f" {left:,.0f} ms", va="center", fontsize=8)
        axis.set_yticks(range(len(there)), [one.label for one in there])
        axis.invert_yaxis()
        of = there[0].result.images[name]
        views = f"{of.views} view{'s' if of.views != 1 else ''}"
        axis.set_title(f"{name}: {views}, {of.image_tokens} image tokens, {of.new_tokens} generated", loc="left")
        axis.grid(axis="y", visible=False)
        axis.set_xlim(0, longest * 1.15)
    axes[-1].set_xlabel("ms")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return _svg(figure, "Milliseconds of an answer by stage")


@_styled
def starts(series: Sequence[Series]) -> str:
    """From the start of a process until it is ready for a question."""
    rows = [
        (f"{one.label}, {kind.replace('_', '-')}", start) for one in series for kind, start in one.result.starts.items()
    ]
    figure, (axis,) = _panels(1, 0.6 + 0.3 * len(rows))
    for row, (_, start) in enumerate(rows):
        left, ready = 0.0, start.ready_ms.median
        parts = [
            ("Python", "python_ms", "#bbbbbb", ""),
            ("imports", "import_ms", ORANGE, ".."),
            ("bundle", "open_ms", SKY, "\\\\"),
        ]
        sizes = [(label, getattr(start, key).median, colour, hatch) for label, key, colour, hatch in parts]
        for label, ms, colour, hatch in [
            *sizes,
            ("graphs", max(0.0, ready - sum(ms for _, ms, *_ in sizes)), BLUE, "//"),
        ]:
            _part(axis, row, left, ms, (label, colour, hatch))
            left += ms
        axis.text(left, row, f" {ready:,.0f} ms", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.12)
    axis.set_xlabel("ms")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return _svg(figure, "Milliseconds from the start of a process until it is ready for a question")


@_styled
def over_time(audits: Sequence[Named], series: Sequence[Series]) -> str:
    """Milliseconds a token in the course of the audit, a point an answer: colours tell images, markers variants.
    Throttling and background load are marked.
    """
    figure, axes = _panels(len(audits), 2.1)
    images = images_of(series)
    for axis, named in zip(axes, audits, strict=True):
        mine = [one for one in series if one.named is named]
        for n, one in enumerate(mine):
            for at, (name, image) in enumerate(one.result.images.items()):
                colour = _LINES[images.index(name) % len(_LINES)][0]
                points = [(p.at_s, p.inter_token_ms) for p in image.over_time if p.inter_token_ms]
                label = f"{one.variant}, {name}" if len(mine) > 1 else name
                if points:
                    marker = _LINES[n % len(_LINES)][1]
                    axis.scatter(
                        *zip(*points, strict=True), marker=marker, s=11, color=colour, label=label, zorder=3 + at
                    )
        _mark_throttling(axis, named.audit.machine.samples)
        _mark_background(axis, named.audit.machine.background)
        axis.set_ylabel("ms a token")
        axis.set_ylim(bottom=0)
        axis.set_title(named.name if len(audits) > 1 else "", loc="left")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)
    axes[-1].set_xlabel("s")
    return _svg(figure, "Milliseconds a token over time")


@_styled
def memory(series: Sequence[Series]) -> str:
    """Return an SVG: anonymous and mapped memory since the process started, one panel a series."""
    figure, axes = _panels(len(series), 1.6)
    top = max((m.anonymous_mib + m.mapped_mib for one in series for m in one.result.memory.timeline), default=1.0)
    for axis, one in zip(axes, series, strict=True):
        found = one.result.memory
        times = [m.at_ms / 1e3 for m in found.timeline]
        anonymous, mapped = ([getattr(m, key) for m in found.timeline] for key in ("anonymous_mib", "mapped_mib"))
        bands = axis.stackplot(
            times, anonymous, mapped, colors=[RED, SKY], labels=["anonymous", "mapped files (can be evicted)"]
        )
        bands[1].set_hatch("//")
        bands[1].set_edgecolor("white")
        if found.peak_mib:
            peak = found.peak_mib.max
            axis.axhline(peak, color=BLACK, linewidth=0.9, linestyle="--", label=f"peak {peak:,.0f}")
        axis.set_ylim(0, top * 1.08)
        axis.set_ylabel("MiB")
        axis.set_title(one.label, loc="left")
        axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3)
    axes[-1].set_xlabel("s since the process started")
    return _svg(figure, "Memory over time")


@_styled
def machine(audits: Sequence[Named]) -> str:
    """Temperature, frequency and power, those that were measured; "" where none was."""
    kinds = [
        (key, unit)
        for key, unit in (("temperature_c", "°C"), ("frequency_mhz", "MHz"), ("power_w", "W"))
        if any(getattr(s, key) is not None for named in audits for s in named.audit.machine.samples)
    ]
    if not kinds:
        return ""
    figure, axes = _panels(len(kinds), 1.4)
    for axis, (key, unit) in zip(axes, kinds, strict=True):
        for n, named in enumerate(audits):
            colour, _, dashes = _LINES[n % len(_LINES)]
            samples = named.audit.machine.samples
            points = [(s.at_s, getattr(s, key)) for s in samples if getattr(s, key) is not None]
            axis.plot(
                [t for t, _ in points],
                [v for _, v in points],
                color=colour,
                linestyle=dashes,
                label=named.name,
                linewidth=1.2,
            )
            _mark_throttling(axis, named.audit.machine.samples)
        axis.set_ylabel(unit)
        axis.yaxis.set_major_locator(MaxNLocator(4))
    if len(audits) > 1:
        axes[0].legend(frameon=False, fontsize=8, ncols=4)
    axes[-1].set_xlabel("s")
    return _svg(figure, "Temperature, frequency and power")


def comparable_losses(series: Sequence[Series]) -> list[Series]:
    """Those whose loss to the same variant, of as many questions, was measured as they ran, two at least; else none."""
    measured = [s for s in series if s.result.kl is not None and not s.result.kl_with and s.result.memory.peak_mib]
    kinds = Counter((one.result.kl_to, one.result.kl_questions) for one in measured).most_common(1)
    there = [one for one in measured if kinds and (one.result.kl_to, one.result.kl_questions) == kinds[0][0]]
    return there if len(there) > 1 else []


@_styled
def quality(series: Sequence[Series]) -> str:
    """What a variant costs beside what it loses; "" where there are no losses to compare."""
    there = comparable_losses(series)
    if not there:
        return ""
    to = there[0].result.kl_to
    image = images_of(there)[-1]
    figure, axes = _panels(1, 2.6, columns=2)
    for axis, label in zip(axes, ("ms to the first token", "MiB at the peak"), strict=True):
        for n, one in enumerate(there):
            colour, marker, _ = _LINES[n % len(_LINES)]
            of = (
                one.result.memory.peak_mib
                if label.startswith("MiB")
                else one.result.images[image].ttft_ms
                if image in one.result.images
                else None
            )
            if of:
                at = of.median
                axis.scatter([at], [one.result.kl], color=colour, marker=marker, s=36, label=one.label)
                axis.annotate(one.label, (at, one.result.kl), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axis.set_xlabel(label)
        axis.margins(0.25)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel(f"KL divergence to {to}, nats")
    return _svg(figure, "Quality lost, and cost")


@_styled
def soak(audits: Sequence[Named]) -> str:
    """Return an SVG: ms a token, minute by minute; "" where no audit has a soak."""
    there = [named for named in audits if named.audit.soak]
    if not there:
        return ""
    figure, (axis,) = _panels(1, 1.9)
    for n, named in enumerate(there):
        colour, marker, dashes = _LINES[n % len(_LINES)]
        minutes = named.audit.soak.minutes if named.audit.soak else ()
        at, ms = [m.minute for m in minutes], [m.inter_token_ms for m in minutes]
        axis.plot(at, ms, color=colour, marker=marker, linestyle=dashes, label=named.name)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("minute")
    axis.set_ylabel("ms a token")
    axis.legend(frameon=False, fontsize=8)
    return _svg(figure, "Milliseconds a token while soaking")


@_styled
def pareto(tuning: TuningResult) -> str:
    """Every point by latency and memory; those on the front have their row's number."""
    points, chosen = tuning.measured, tuning.point(tuning.chosen)
    fronts = [tuning.point(settings) for settings in tuning.front]
    figure, (axis,) = _panels(1, 4.2)
    floor = tuning.floor_kl
    good, rest = ([p for p in points if ((p.kl or 0) <= floor) is wanted] for wanted in (True, False))
    for label, group, colour, marker in ((f"KL ≤ {floor:g}", good, BLUE, "o"), (f"KL > {floor:g}", rest, ORANGE, "x")):
        if group:
            ms, mib = [p.ms for p in group], [p.peak_mib for p in group]
            axis.scatter(ms, mib, color=colour, marker=marker, s=22, alpha=0.8, label=label)
    for number, point in enumerate(fronts, 1):
        samples = point.latency_ms.values()
        axis.plot([min(samples), max(samples)], [point.peak_mib] * 2, color="#888888", linewidth=0.7)
        axis.annotate(str(number), (point.ms, point.peak_mib), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.scatter(
        [chosen.ms], [chosen.peak_mib], facecolors="none", edgecolors=RED, s=130, linewidths=1.8, label="chosen"
    )
    axis.set_xlabel("ms of an answer (line: fastest to slowest)")
    axis.set_ylabel("MiB at the peak")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    return _svg(figure, "Latency and memory of all points measured")


def _part(axis: Any, row: int, left: float, ms: float, look: tuple[str, str, str]) -> None:
    """A piece of a bar; named in the first row alone."""
    label, colour, hatch = look
    axis.barh(
        row,
        ms,
        left=left,
        height=0.62,
        color=colour,
        hatch=hatch,
        edgecolor="white",
        linewidth=0.4,
        label="" if row else label,
    )


def _mark_background(axis: Any, background: Sequence[BackgroundAt]) -> None:
    """Shade the processes beside which others used more than a valid audit allows."""
    label: str | None = f"others used more than {MOST_BACKGROUND:.0%} of the processors"
    for process in background:
        if process.share > MOST_BACKGROUND:
            axis.axvspan(process.at_s, process.until_s, color="#bbbbbb", alpha=0.45, linewidth=0, label=label, zorder=0)
            label = None


def _mark_throttling(axis: Any, samples: Sequence[MachineAt]) -> None:
    marked = [s.at_s for s in samples if s.throttled]
    for n, at in enumerate(marked):
        axis.axvspan(at - 0.25, at + 0.25, color=RED, alpha=0.25, linewidth=0, label="throttled" if n == 0 else None)


def _panels(rows: int, height: float, columns: int = 1) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(_WIDTH, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [axis for row in axes for axis in row]


def _svg(figure: Figure, title: str) -> str:
    """To be put into a page: without XML header, with a title for those who do not see it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    return text.replace(">", f' role="img" aria-label="{title}">', 1)
