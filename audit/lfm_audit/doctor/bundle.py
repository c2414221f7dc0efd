"""The bundle on this machine, as `run` would use it. Needs onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lfm_profiles import FINEST
from lfm_runtime import golden
from lfm_runtime.engine.loader import check_onnxruntime
from lfm_runtime.engine.ort_release import FOLDERS_SINCE, onnxruntime_is
from lfm_runtime.engine.prepared import find, folder_of, remove_damaged
from lfm_runtime.errors import command
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER
from lfm_runtime.formats.files import to_write
from lfm_runtime.formats.manifest import SUMS
from lfm_runtime.formats.onnx_file import external_files
from lfm_runtime.model import Model  # noqa: F401  (what the process has once it is loaded is part of the forecast)
from lfm_runtime.setup.resolve import resolve
from lfm_runtime.setup.setup import Ask, Setup
from lfm_runtime.setup.variants import made_with, unmet

from lfm_audit.doctor.finding import Finding, Machine, judged


def bundle(machine: Machine) -> Iterator[Finding]:
    """What it holds, whether its files agree, and what of the profile's wishes it lacks."""
    setup = _setup(machine)
    bundle = setup.bundle
    if problems := bundle.contradictions():
        yield Finding("bundle", "problem", problems[0])
        return
    for path in bundle.graphs_read(setup.variant, setup.prefill):
        check_onnxruntime(bundle, path)
        if onnxruntime_is(FOLDERS_SINCE) and (away := _weights_elsewhere(path)):
            said = f"{away} is a link to another folder, which onnxruntime refuses"
            yield Finding("bundle", "problem", said, "copy the bundle with its files: cp -rL")
            return
    size = sum(file.bytes for file in bundle.files.values())
    signed = ", signed" if (bundle.folder / "SHA256SUMS.sig").exists() else ""
    said = f"{', '.join(bundle.variants)}; {size / 1e6:,.0f} MB{signed}; {setup.profile.name} takes {setup.variant}"
    if not bundle.manifest:
        fix = "make a bundle with: lfm-edge export"
        yield Finding("bundle", "warning", f"{said}; a folder without manifest.json: nothing to check against", fix)
        return
    packed = (bundle.folder / SUMS).exists()  # for a board, where nothing can be quantized
    for wish in unmet(bundle, setup.profile):
        why = f"profile {setup.profile.name} would use {wish}, which the bundle lacks"
        do = made_with(bundle, wish)
        if packed or not set(FINEST).intersection(bundle.variants):
            do = f"where the bundle was made: {made_with(bundle, wish, 'BUNDLE')}, then pack or stick it again"
        yield Finding("variants", "warning", why, do)
    steps = f"; to fit the memory ({setup.bound}): {'; '.join(setup.steps)}" if setup.steps else ""
    yield judged("bundle", bool(steps) and "warning", f"{said}{steps}", setup.remedy)


def _weights_elsewhere(graph: Path) -> Path | None:
    """A file of a graph's weights that onnxruntime refuses: below neither the graph's folder nor, where the graph is a
    link itself as in the hub's cache, the folder that it leads to.
    """
    allowed = graph.parent.resolve(), graph.resolve().parent
    files = (graph.parent / name for name in sorted(external_files(graph)))
    return next((file for file in files if not any(file.resolve().is_relative_to(place) for place in allowed)), None)


def _setup(machine: Machine) -> Setup:
    """Return the setup that `run` would use for the bundle on this machine."""
    assert machine.bundle is not None
    ask = Ask((golden.SIZE,), golden.QUESTION)
    return resolve(machine.bundle, machine.profile, ask, device=machine.device)


def prepared(machine: Machine) -> Iterator[Finding]:
    """Whether its graphs are prepared for this processor and onnxruntime."""
    setup = _setup(machine)
    bundle, variant, prefill = setup.bundle, setup.variant, setup.prefill
    if not setup.execution.prepared:
        yield Finding("prepared", "ok", f"profile {setup.profile.name} does not use prepared graphs")
        return
    paths = [setup.paths[graph.stem] for graph in (VISION_ENCODER, DECODER)]
    paths += [bundle.graphs(prefill)[1][DECODER.stem]] if prefill else []
    notes = remove_damaged(bundle, paths)
    found = [find(bundle, path) for path in paths]
    notes += [one.note for one in found if one.note]
    fix = command("prepare", machine.bundle, "--variant", variant, *(["--prefill", prefill] if prefill else []))
    place = folder_of(bundle.folder).parent
    if not os.access(there := place if place.exists() else place.parent, os.W_OK):
        fix = f"{to_write(there)}, where what is prepared lies; then {fix}"
    if notes:
        yield Finding("prepared", "warning", notes[0], fix)
    elif not (missing := [path for one, path in zip(found, paths, strict=True) if one.path == path]):
        also = f" and the decoder of {prefill}" if prefill else ""
        yield Finding("prepared", "ok", f"{variant}{also}, for this processor and onnxruntime")
    else:
        what = f"the decoder of {prefill} that reads prompts" if prefill and missing == paths[-1:] else variant
        yield Finding(
            "prepared", "warning", f"{what} is not prepared: it starts more slowly and takes more memory", fix
        )
