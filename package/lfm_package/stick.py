"""What goes on a USB stick: wheels, one variant of a bundle, a profile, and install.sh, which needs neither network nor
root.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lfm_profiles import Profile
from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.gpu_wheel import CUDA
from lfm_runtime.engine.prepare import space_needed
from lfm_runtime.errors import BundleError, SettingError
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER
from lfm_runtime.formats.files import check_output, check_room
from lfm_runtime.formats.manifest import SIGNATURE, SUMS, Manifest, file_hash
from lfm_runtime.formats.writer import check_no_link, replacing
from lfm_runtime.formats.writer import check_place as check_folder
from packaging.version import Version

from lfm_package.pack import NOTHING, Extras, entry, is_packed, pack, reduced
from lfm_package.signature import sign
from lfm_package.targets import Platform
from lfm_package.wheelhouse import Wheel, glibc_needed, wheelhouse

INSTALL = "install.sh"
SETTINGS = "stick.conf"
README = "README.txt"
_README = """\
lfm-edge stick "{name}"
for {platform}

It installs a vision-language model and what runs it. It needs neither network nor root:

    sh install.sh              installs into ~/.local/share/lfm-edge, and tests it
    sh install.sh --help       other places, signatures
    lfm-edge-install --rollback, --uninstall      afterwards, in ~/.local/share/lfm-edge/bin

Every file here is checked against SHA256SUMS before anything is installed.
"""
_LARGEST_FILE = 4_000_000_000  # FAT32 holds no larger ones
_WITH_BYTECODE = 1.4  # what installed wheels take, against their files
_SPARE = 32 << 20
_LEAST_WHEELS = 40 << 20  # what the runtime's wheels take at least, before they are downloaded


def check_profile(profile: Profile, platform: Platform) -> None:
    """Raise SettingError for a profile that cannot run on a stick's onnxruntime."""
    if CUDA in profile.providers:
        raise SettingError(
            f"profile {profile.name} runs on a GPU, and the stick's onnxruntime does not; choose another: "
            f"--profile {platform.target.profile}"
        )


def is_stick(archive: Path) -> bool:
    """Whether `write_stick` wrote this file."""
    return is_packed(archive, INSTALL)


def check_place(output: Path, platform: Platform, *, signed: bool, force: bool) -> None:
    """Raise EdgeError where a stick, a folder or NAME.tar, would replace what is not one; or, without `force`, another
    board's stick, or a signed one by one that is not.
    """
    if output.suffix == ".tar":
        check_no_link(output)
        check_output(output, "lfm-edge stick", is_stick, force=force)
    else:
        check_folder(output)
        _check_ours(output)
    if not force:
        _check_like(output, platform, signed=signed)


def write_stick(
    folder: Path,
    variants: Sequence[str],
    platform: Platform,
    output: Path,
    extras: Extras = NOTHING,
    *,
    force: bool = False,
) -> list[Wheel]:
    """Write a stick's content as a folder, or as NAME.tar. What was there before stays until all is written.

    Args:
        folder: the bundle.
        variants: the first is what the device takes by default.
        platform: the device.
        output: a folder, or NAME.tar.
        extras: a profile (without one, the device chooses), a golden set, a key of ssh, with which install.sh can tell
            who made the stick, extras of lfm-edge.
        force: also replace the stick of another board, or a signed one by one that is not.

    Raises:
        BundleError: as `pack`; or the target's onnxruntime is too old for the bundle; or the output cannot be written.
        WheelhouseError: the wheels cannot be had.
    """
    manifest = reduced(folder, variants)
    check_place(output, platform, signed=bool(extras.sign_with), force=force)
    _check_space(output, sum(file.bytes for file in manifest.files.values()) + _LEAST_WHEELS)
    name = output.name.removesuffix(".tar")
    if not name:
        raise SettingError(f"{output} has no name; name a folder or a .tar")
    if output.suffix != ".tar":

        def check(there: Path) -> None:
            check_place(there, platform, signed=bool(extras.sign_with), force=force)

        with replacing(output, check=check) as stick:
            return _fill(stick, name, folder, variants, manifest, platform, extras)
    work = output.with_name(f".{output.name}.partial")
    try:
        wheels = write_stick(folder, variants, platform, work / name, extras)
        _as_tar(work / name, work / output.name)
        (work / output.name).replace(output)
    except OSError as e:
        raise BundleError(f"cannot write {output}: {e.strerror or e}; existing files are unchanged") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return wheels


def _fill(
    stick: Path,
    name: str,
    folder: Path,
    variants: Sequence[str],
    manifest: Manifest,
    platform: Platform,
    extras: Extras,
) -> list[Wheel]:
    wheels = wheelhouse(platform, stick / "wheels", extras.with_extras)
    _check_onnxruntime(folder, manifest, wheels, platform)
    size = sum(file.bytes for file in manifest.files.values())
    split = _LARGEST_FILE if size > _LARGEST_FILE else 0
    pack(folder, variants, stick / f"{name}.tar", replace(extras, wheels=wheels, split=split))
    (stick / f"{name}.tar.sha256").unlink()  # SHA256SUMS has it
    shutil.copyfile(Path(__file__).with_name(INSTALL), stick / INSTALL)
    (stick / INSTALL).chmod(0o755)
    settings = {
        "name": name,
        "variant": variants[0],
        "prefill": variants[1] if len(variants) > 1 else "",
        "target": platform.target.name,
        "machine": platform.target.machine,
        "python": platform.system.python,
        "glibc_minor": glibc_needed(wheels),
        "need_kib": _needed(folder, variants, size, wheels) >> 10,
    }
    (stick / SETTINGS).write_text("".join(f"{key}={value}\n" for key, value in settings.items()), encoding="utf-8")
    (stick / README).write_text(_README.format(name=name, platform=platform), encoding="utf-8")
    sums = {path.relative_to(stick).as_posix(): path for path in stick.rglob("*") if path.is_file()}
    lines = [f"{file_hash(path)}  {place}\n" for place, path in sorted(sums.items())]
    (stick / SUMS).write_text("".join(lines), encoding="utf-8")
    if extras.sign_with:
        sign(stick / SUMS, extras.sign_with)
    return wheels


def _check_onnxruntime(folder: Path, manifest: Manifest, wheels: Sequence[Wheel], platform: Platform) -> None:
    there = next(wheel.version for wheel in wheels if wheel.name == "onnxruntime")
    for graph, described in manifest.graphs.items():
        if there < Version(described.min_onnxruntime):
            needs = f"{folder}/{graph} needs onnxruntime {described.min_onnxruntime} or later"
            raise BundleError(f"{needs}; the newest for {platform} is {there}; take another variant")


def _needed(folder: Path, variants: Sequence[str], size: int, wheels: Sequence[Wheel]) -> int:
    """Bytes that an installation takes at most: environment, bundle, prepared graphs."""
    bundle = Bundle.open(folder)
    graphs = {
        bundle.graphs(variants[0])[1][VISION_ENCODER.stem],
        *(bundle.graphs(v)[1][DECODER.stem] for v in variants),
    }
    return (
        int(sum(w.unpacked for w in wheels) * _WITH_BYTECODE)
        + size
        + sum(space_needed(graph) for graph in graphs)
        + _SPARE
    )


def _as_tar(stick: Path, output: Path) -> None:
    with tarfile.open(output, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(p for p in stick.rglob("*") if p.is_file()):
            with path.open("rb") as f:
                name = f"{stick.name}/{path.relative_to(stick).as_posix()}"
                tar.addfile(entry(name, path.stat().st_size, 0o755 if path.name == INSTALL else 0o644), f)


def _check_space(output: Path, size: int) -> None:
    """Raise BundleError where the stick has no room, before anything is downloaded for it."""
    place = next(parent for parent in output.absolute().parents if parent.is_dir())
    check_room(place, size, output.name, BundleError)


def _check_like(output: Path, platform: Platform, *, signed: bool) -> None:
    """Raise BundleError where a stick would replace one for another board, or one that is signed."""
    settings, was_signed = _settings_of(output)
    target = next((line[7:] for line in settings.splitlines() if line.startswith("target=")), None)
    if target is None:
        return
    if target != platform.target.name:
        raise BundleError(f"{output} is a stick for {target}; choose another output, or replace it with --force")
    if was_signed and not signed:
        raise BundleError(f"{output} is a signed stick; sign this one too: --sign KEY, or replace it with --force")


def _settings_of(stick: Path) -> tuple[str, bool]:
    """The text of a stick's settings, "" where there is none, and whether it is signed."""
    if stick.is_dir():
        path = stick / SETTINGS
        return path.read_text(encoding="utf-8") if path.is_file() else "", (stick / SIGNATURE).exists()
    if not stick.exists() or not stick.stat().st_size:
        return "", False
    top = stick.name.removesuffix(".tar")
    with tarfile.open(stick, "r:") as tar:
        names = tar.getnames()
        file = tar.extractfile(f"{top}/{SETTINGS}") if f"{top}/{SETTINGS}" in names else None
        return file.read().decode("utf-8", "replace") if file else "", f"{top}/{SIGNATURE}" in names


def _check_ours(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / SETTINGS).is_file() or not (folder / SUMS).is_file():
        raise BundleError(f"{folder} is not something lfm-edge stick made; choose another output")
    ours = {
        line.partition("  ")[2] for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    }
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in ours | {SUMS, SIGNATURE}:
            raise BundleError(f"{path} is not part of the stick and would be lost; move it or choose another output")
