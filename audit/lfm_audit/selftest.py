"""Does this bundle work on this device? Each check is a function that raises CheckError with what to do, or Skipped
with the reason.

`lfm-edge selftest` runs them in order; device_tests/ runs them under pytest.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import onnxruntime as ort
from lfm_profiles import VARIANTS, to_toml
from lfm_profiles.sensors import Sensors
from lfm_runtime import Answer, Model, golden
from lfm_runtime.engine.gpu import provider_options
from lfm_runtime.engine.ort_release import refuses_links
from lfm_runtime.engine.prepared import remove_damaged
from lfm_runtime.errors import EdgeError, command, counted, is_out_of_memory, more_memory
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER
from lfm_runtime.formats.files import linked_copy
from lfm_runtime.formats.manifest import BESIDE_MANIFEST
from lfm_runtime.images.layout import lay_out
from lfm_runtime.images.opened import OpenedImage
from lfm_runtime.process import last_line, run_command
from lfm_runtime.questions import GoldenSet, differing
from lfm_runtime.setup.machine import this_machine
from lfm_runtime.setup.resolve import resolve
from lfm_runtime.setup.setup import Ask
from lfm_runtime.text.messages import Message

from lfm_audit.measure.growth import allowed_growth, least_growth
from lfm_audit.measure.trial import Trial, start
from lfm_audit.summary import decode_rate, ttft

_ANSWERS, _WARM_UP = 100, 10


class CheckError(EdgeError, AssertionError):
    """Something is not as it should be; the message says what and what to do."""


class Skipped(Exception):  # noqa: N818  (as pytest's)
    """Raised by a check that has nothing to check here; the message says why."""


@dataclass(frozen=True)
class Check:
    """`needs`: cpu, arm, cuda or sensor. `of_the_machine`: what fails here is how the machine does today, not that
    something is broken.
    """

    name: str
    needs: str
    run: Callable[[Installed], str]  # returns what was found, in a few words
    of_the_machine: bool = False


class Installed:
    """The bundle as it lies on the device, with the profile it is run by. The model is loaded once, when a check first
    wants it.
    """

    def __init__(self, folder: Path, profile: str = "", variant: str | None = None) -> None:
        """Raises what Bundle.open and find_profile raise, and DoesNotFitError where the device's memory does not
        suffice.
        """
        self.folder = folder
        ask = Ask((golden.SIZE,), golden.QUESTION)
        self.setup = resolve(folder, profile, ask, variant=variant)
        self.bundle, self.profile = self.setup.bundle, self.setup.profile

    @cached_property
    def model(self) -> Model:
        """The model, loaded at the first use with the setup that `run` would use."""
        return Model.of(self.setup)


def _files(on: Installed) -> str:
    """Check the SHA-256 of every file that the manifest names, and of what was prepared."""
    try:
        on.bundle.verify()
    except EdgeError as e:
        raise CheckError(str(e)) from e
    if problems := on.bundle.contradictions():
        raise CheckError(problems[0])
    if damaged := remove_damaged(on.bundle, [path for of in on.bundle.variants.values() for path in of.values()]):
        raise CheckError(damaged[0])
    if not on.bundle.files:
        raise Skipped("a folder without manifest.json: nothing to compare with; make a bundle with lfm-edge export")
    there = sum(path.is_file() for path in on.folder.rglob("*"))
    more = there - len(on.bundle.files) - sum((on.folder / name).exists() for name in BESIDE_MANIFEST)
    unnamed = f"; {more} more that manifest.json does not name" if more > 0 else ""
    return f"{counted(len(on.bundle.files), 'file')}{unnamed}"


def _loads(on: Installed) -> str:
    """Load decoder and vision encoder, and check that each runs on the provider of the profile."""
    try:
        graphs = on.model.sessions
        sessions = {DECODER: on.model.decoder.load().decoder, VISION_ENCODER: graphs.vision()}
    except EdgeError as e:
        raise CheckError(f"{e}; if it loads elsewhere, run: {command('prepare', on.folder)}") from e
    for graph, session in sessions.items():
        wanted = provider_options(on.setup.execution, graph)[0][0]
        if wanted not in session.get_providers():
            here = session.get_providers()[0]
            raise CheckError(
                f"{graph.stem} runs on {here}, profile {on.profile.name} wants {wanted}; see lfm-edge profile detect"
            )
    return f"{on.setup.variant} with {on.profile.providers[0]}, {counted(on.setup.execution.threads, 'thread')}"


def _golden(on: Installed) -> str:
    """Tokens, patches, features, logits, against where the bundle was made. Each decoder by itself: one that continues
    what another has read is a mixture that nobody recorded.
    """
    found = []
    for variant in filter(None, (on.setup.variant, on.setup.prefill)):
        kept = golden.golden_of(on.bundle, variant)
        if kept is None:
            continue
        deviation = golden.compare(
            Model.load(on.bundle, profile=on.profile, ask=on.setup.ask, variant=variant, prefill="none"), kept
        )
        gc.collect()  # one model at a time
        if problems := deviation.problems(variant):
            made = f"made with onnxruntime {kept.onnxruntime} on {' '.join(kept.cpu_features)[:80]}"
            raise CheckError(
                f"{variant}: {'; '.join(problems)} ({made}). Try prepared = false, then another onnxruntime, and "
                "report it"
            )
        features, logits = VARIANTS[variant].tolerance
        found.append(
            f"{variant}: error of features {deviation.features:.1g} (allowed {features:g}), of logits "
            f"{deviation.logits:.1g} (allowed {logits:g})"
        )
    if not found:
        raise Skipped("the bundle has no golden values of this variant; export or quantize it again to have them")
    return "; ".join(found)


def _answers(on: Installed) -> str:
    """Check that two greedy answers to one question are the same."""
    said = [
        on.model.answer([golden.golden_image()], golden.QUESTION, temperature=0, max_new_tokens=12).text()
        for _ in range(2)
    ]
    if said[0] != said[1]:
        raise CheckError(
            f"the same question was answered with {said[0]!r} and {said[1]!r}; check memory (memtester) and power "
            "supply"
        )
    return repr(said[0][:40])


def _schema(on: Installed) -> str:
    """Check that an answer keeps to a JSON schema, where what that needs is installed."""
    if find_spec("llguidance") is None:
        raise Skipped("the extra json is not installed")
    said = on.model.answer([], "Is it red?", schema='{"enum": ["yes", "no"]}', temperature=0).text()
    if said not in ('"yes"', '"no"'):
        raise CheckError(f"an answer in a JSON schema is {said!r}, which is not of it; install lfm-edge again")
    return said


def _budgets(on: Installed) -> str:
    """Check the profile's budgets by answers of a process of its own."""
    budget = on.profile.budget
    if not any((budget.peak_rss_mib, budget.ttft_ms, budget.decode_tok_s)):
        raise Skipped(f"profile {on.profile.name} has no budget")
    with tempfile.TemporaryDirectory(prefix="lfm-edge-") as folder:
        golden.golden_image().save(Path(folder) / "image.png")
        outcome = start(Trial(on.folder, on.profile, [Path(folder) / "image.png"], repeats=3, new_tokens=16))
    last = outcome.answers[-1]
    rate = statistics.median(decode_rate(answer) for answer in outcome.answers[1:])
    broken = []
    peak = outcome.memory_mib["peak"] or 0.0
    if budget.peak_rss_mib is not None and peak > budget.peak_rss_mib:
        broken.append(f"peak_rss_mib {budget.peak_rss_mib}: {peak:.0f} MiB; try low_memory or lfm-edge prepare")
    if budget.ttft_ms is not None and ttft(last) > budget.ttft_ms:
        broken.append(f"ttft_ms {budget.ttft_ms:g}: {ttft(last):.0f} ms; try fewer image tokens")
    if budget.decode_tok_s is not None and rate < budget.decode_tok_s:
        broken.append(f"decode_tok_s {budget.decode_tok_s:g}: {rate:.1f} tok/s; try int4, or see what else runs")
    if broken:
        raise CheckError(f"over the budget of profile {on.profile.name}: {'; '.join(broken)}")
    return f"peak {peak:.0f} MiB, first token {ttft(last):.0f} ms, {rate:.1f} tok/s"


def _steady_memory(on: Installed) -> str:
    """Check that anonymous memory does not grow over many answers."""
    for _ in range(_WARM_UP):
        _small_answer(on, 3).text()

    def answers() -> None:
        for _ in range(_ANSWERS):
            _small_answer(on, 3).text()

    grown = _grown(answers, f"{_ANSWERS} answers", "restart the process now and then, and report it")
    return f"{grown} after {_ANSWERS} answers"


def _cancel(on: Installed) -> str:
    """An answer that is closed early leaves nothing behind, and the next is as before."""
    wanted = _small_answer(on, 8).text()

    def cancelled() -> None:
        for _ in range(10):
            pieces = iter(_small_answer(on, 8))
            next(pieces, None)
            pieces.close()  # type: ignore[attr-defined]

    grown = _grown(cancelled, "10 cancelled answers", "report it")
    if _small_answer(on, 8).text() != wanted:
        raise CheckError("after a cancelled answer the same question is answered differently; report it")
    return grown


def _full_disk(on: Installed) -> str:
    """No block can be written anywhere: an answer comes all the same, also with a cache folder on that disk."""
    if sys.platform == "win32":
        raise Skipped("a full disk is simulated by a file size limit, which Windows has not")
    # 512 bytes, not 0: qemu's user emulation writes what it shows as /proc/self/stat into a file first.
    full = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))"
    )
    with tempfile.TemporaryDirectory(prefix="lfm-edge-") as folder:
        image = Path(folder) / "image.png"
        golden.golden_image().save(image)
        words = ["run", str(on.folder), str(image), "-p", golden.QUESTION, "--max-new-tokens", "3"]
        words += ["--cache", str(Path(folder) / "cache")]
        done = run_command([*words, "--profile", _profile_file(on, folder)], first=full)
    if done.returncode:
        said = last_line(done.stderr)  # often with what to do; the disk need not be at fault
        raise CheckError(f"with a full disk it does not answer: {said}{'' if '; ' in said else '; free some space'}")
    return "answers"


def _read_only(on: Installed) -> str:
    """Answering writes nothing into the bundle's folder, and works where that is not allowed."""
    if refuses_links():
        raise Skipped(f"the check is made with links to the weights, which onnxruntime {ort.__version__} refuses")
    before = _marks(on.folder)
    with tempfile.TemporaryDirectory(prefix="lfm-edge-") as folder:
        place = Path(folder) / "bundle"
        linked_copy(on.folder, place)
        folders = [place, *(p for p in place.rglob("*") if p.is_dir())]
        for inside in folders:
            inside.chmod(0o555)
        linked = _marks(place)
        try:
            words = ["run", str(place), "-p", "Hello", "--max-new-tokens", "3", "--profile", _profile_file(on, folder)]
            done = run_command(words)
            written = _marks(place) != linked or _marks(on.folder) != before
        finally:
            for inside in folders:
                inside.chmod(0o755)
    if done.returncode:
        raise CheckError(f"from a read-only folder it does not answer: {last_line(done.stderr)}; report it")
    if written:
        raise CheckError(
            f"answering wrote into the bundle's folder ({on.folder}); report it, and keep the bundle read-only"
        )
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    return "answers, writes nothing" + (
        " (root can write to read-only folders: also run this as a normal user)" if as_root else ""
    )


def _arm(on: Installed) -> str:
    """What an Arm processor has, and whether it lacks something that the variant wants: that is slow, not wrong."""
    if platform.machine() not in ("aarch64", "arm64"):
        raise Skipped(f"this is {platform.machine()}")
    features = this_machine().device.features
    slow = VARIANTS[on.setup.variant].weights == "int8" and "asimddp" not in features
    return ("no dot products (asimddp), so int8 is slow here and int4 the better choice: " if slow else "") + " ".join(
        features
    )


def _cuda(on: Installed) -> str:
    """Check that there is a GPU, where the profile asks for one."""
    if "CUDAExecutionProvider" not in on.profile.providers:
        raise Skipped(f"profile {on.profile.name} runs on the CPU")
    if not this_machine().device.cuda:
        raise CheckError(f"profile {on.profile.name} needs a GPU, and there is none; use --profile auto")
    return str(this_machine().device.gpu)


def _sensors(_: Installed) -> str:
    """Check that the machine is not throttled now; return its highest temperature."""
    sensors = Sensors()
    found = sensors.read()
    if found.throttled_now:
        raise CheckError(f"the board is throttled now (bits {found.throttle_bits:#x}): check power supply and cooling")
    if not found.temperature_c and found.power_w is None and found.energy_uj is None:
        raise Skipped("; ".join(f"no {name}: {reason}" for name, reason in sensors.missing.items()))
    warmest = max(found.temperature_c.values(), default=None)
    return "" if warmest is None else f"{warmest:.0f} °C"


def _golden_questions(on: Installed) -> str:
    """Ask the user's own golden set. Processors round int8 and int4 differently at times: few answers may differ."""
    kept = GoldenSet.of(on.bundle)
    if kept is None:
        raise Skipped("the bundle has no golden set of its own; add one: lfm-edge stick … --golden questions.jsonl")
    others, asked = list(differing(on.model, kept)), len(kept.answers)
    said = f"{asked - len(others)} of {asked} answers are those of {kept.setup}"
    for one, here in others[:1]:
        said += f"; {one.image}, {one.question!r}: {here!r} instead of {one.answer!r}"
    if len(others) > _MOST_DIFFERING * asked:
        raise CheckError(f"{said}; at most {_MOST_DIFFERING:.0%} may differ. Here: {on.model.setup.summary}")
    return said


_MOST_DIFFERING = 0.1
CHECKS = (  # those that start processes or load a model of their own come before the model that stays
    Check("files and hashes", "cpu", _files),
    Check("full disk", "cpu", _full_disk),
    Check("read-only bundle", "cpu", _read_only),
    Check("budgets", "cpu", _budgets, of_the_machine=True),
    Check("golden values", "cpu", _golden),
    Check("graphs load", "cpu", _loads),
    Check("answers", "cpu", _answers),
    Check("answers in a schema", "cpu", _schema),
    Check("golden questions", "cpu", _golden_questions),
    Check("steady memory", "cpu", _steady_memory),
    Check("cancelled answers", "cpu", _cancel),
    Check("arm", "arm", _arm),
    Check("gpu", "cuda", _cuda),
    Check("sensors", "sensor", _sensors, of_the_machine=True),
)


@dataclass(frozen=True)
class Result:
    """Outcome of one check: ok, failed or skipped, and why."""

    name: str
    outcome: str
    said: str
    seconds: float


def selftest(on: Installed) -> Iterator[Result]:
    """Run every check; what one raises does not keep the others from running."""
    for check in CHECKS:
        begun = time.perf_counter()
        try:
            outcome, said = "ok", check.run(on)
        except Skipped as e:
            outcome, said = "skipped", str(e)
        except EdgeError as e:
            outcome, said = "failed", str(e)
        except Exception as e:  # noqa: BLE001  (one check that breaks must not hide the others)
            short = is_out_of_memory(e)
            said = f"not enough memory ({e}); {more_memory()}" if short else f"{type(e).__name__}: {e}; report it"
            outcome = "failed"
        yield Result(check.name, outcome, said, time.perf_counter() - begun)


def _small_answer(on: Installed, tokens: int) -> Answer:
    """About an image of four tokens: a hundred of them do not keep a slow board for minutes."""
    settings = replace(on.setup.images, min_image_tokens=4, do_image_splitting=False)
    image = golden.golden_image().resize((2 * settings.cell, 2 * settings.cell))
    planned = OpenedImage(image, lay_out(image.width, image.height, settings), settings)
    return on.model.converse([Message.user(golden.QUESTION, 1)], [planned], temperature=0, max_new_tokens=tokens)


def _grown(work: Callable[[], None], what: str, do: str) -> str:
    """What the work adds to anonymous memory, in words; raises CheckError where that is a leak."""
    grown, before = least_growth(work)
    if grown > allowed_growth(before):
        more = f"memory grew by {grown:.1f} MiB ({grown / before:.1%}) in {what}"
        raise CheckError(f"{more}, each time they were repeated; {do}")
    return f"{grown:+.1f} MiB of {before:.0f}"


def _profile_file(on: Installed, folder: str) -> str:
    path = Path(folder) / "profile.toml"
    path.write_text(to_toml(on.profile), encoding="utf-8")
    return str(path)


def _marks(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())
