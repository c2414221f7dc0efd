"""The bundle of a run, on each machine: the folder that is named where it is the same one, or fetched once by URL into
this machine's cache, under the hash of its manifest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lfm_profiles import Profile
from lfm_runtime.bundle import FETCHED, Bundle
from lfm_runtime.errors import BundleError, EdgeError
from lfm_runtime.formats.contract import DECODER
from lfm_runtime.formats.files import check_room
from lfm_runtime.formats.manifest import MANIFEST, PROFILE, File, Manifest, file_hash
from lfm_runtime.setup.hub import HubId, bundle_folder
from lfm_runtime.setup.profile import VARIABLE, find_profile
from lfm_runtime.setup.variants import choose_variants

from lfm_fleet.places import filesystem, is_url, reading, why


def open_bundle(place: str, profile: str, flags: Mapping[str, Any], wanted: str = "") -> tuple[Bundle, str]:
    """(a bundle, the SHA-256 of its manifest). `profile` and `flags` as of `resolve`: of the graphs of an URL, those
    alone that they come to are fetched; `wanted`: the hash that it must have.

    Raises:
        BundleError: it is not here, is another one, or cannot be fetched.
    """
    if HubId.parse(place):
        place = str(bundle_folder(place, find_profile(profile or os.environ.get(VARIABLE, ""), **flags), quiet=True))
    if is_url(place):
        return _fetched(place.rstrip("/"), profile, flags, wanted)
    folder = Path(place)
    if wanted and not folder.exists():
        raise BundleError(f"{folder} does not exist there; copy it there, or name an URL that all workers can read")
    bundle = Bundle.open(folder)
    if bundle.manifest is None:
        raise BundleError(f"{folder} has no {MANIFEST}, by which workers tell bundles apart; export it with lfm-edge")
    return bundle, _same(file_hash(bundle.folder / MANIFEST), wanted, place)


def as_sent(place: str) -> str:
    """A bundle's place as every machine finds it: an URL or an id of the hub as it is, a path from the root."""
    return place if is_url(place) or HubId.parse(place) else os.path.abspath(place)  # noqa: PTH100  (links stay)


def _same(found: str, wanted: str, place: str) -> str:
    if wanted and found != wanted:
        raise BundleError(
            f"{place} is another bundle there: its manifest's hash is {found[:12]}, this run's {wanted[:12]}; copy the "
            "same one there"
        )
    return found


def cache_folder() -> Path:
    """Where bundles are kept that were fetched; one of them is removed by removing its folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "lfm-edge" / FETCHED


def _fetched(url: str, profile: str, flags: Mapping[str, Any], wanted: str) -> tuple[Bundle, str]:
    """Fetch what is not here yet. Several processes may do so at once."""
    if wanted and (cache_folder() / wanted[:16] / MANIFEST).exists():
        raw = (cache_folder() / wanted[:16] / MANIFEST).read_bytes()
    else:
        fs, path = filesystem(f"{url}/{MANIFEST}")
        with reading(f"{url}/{MANIFEST}", "name the URL of a bundle, as lfm-edge export makes them"):
            raw = bytes(fs.cat_file(path))
    found = _same(hashlib.sha256(raw).hexdigest(), wanted, url)
    folder = cache_folder() / found[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not (folder / MANIFEST).exists():
                with _placed(folder / MANIFEST) as temporary:
                    temporary.write_bytes(raw)
            manifest = Manifest.of(folder)
            graphs = {name for graph, entry in manifest.graphs.items() for name in (graph, *entry.data)}
            for name in manifest.files.keys() - graphs:
                _fetch(f"{url}/{name}", folder / name, manifest.files[name])
            packed = str(folder / PROFILE) if PROFILE in manifest.files else ""
            for name in _read_by(manifest, find_profile(profile or os.environ.get(VARIABLE) or packed, **flags)):
                _fetch(f"{url}/{name}", folder / name, manifest.files[name])
    except EdgeError:  # of an URL, an OSError too
        raise
    except OSError as e:
        raise BundleError(f"{folder} cannot be written ({why(e)}); free some space, or set XDG_CACHE_HOME") from e
    return Bundle.open(folder), found


def _read_by(manifest: Manifest, profile: Profile) -> set[str]:
    """Files of the graphs that a profile comes to; raises BundleError where the bundle lacks its variant."""
    variant, prefill = choose_variants(manifest.variants, profile)
    if variant not in manifest.variants:
        raise BundleError(f"the bundle has no variant {variant!r}; it has {', '.join(manifest.variants)}")
    graphs = {*manifest.variants[variant].values(), *([manifest.variants[prefill][DECODER.stem]] if prefill else [])}
    return {name for graph in graphs for name in (graph, *manifest.graphs[graph].data)}


def _fetch(url: str, path: Path, file: File) -> None:
    """Fetch a file, whole and with the manifest's hash, or not at all."""
    with suppress(OSError):
        if path.stat().st_size == file.bytes:  # put here by this function, after its hash was looked at
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    check_room(path.parent, file.bytes, url, BundleError)
    fs, inner = filesystem(url)
    with _placed(path) as temporary:
        with reading(url, "copy the bundle there again"):
            fs.get_file(inner, str(temporary))  # opened, some servers would have to know ranges
        if file_hash(temporary) != file.sha256:
            raise BundleError(f"{url} is damaged (its SHA-256 is not the manifest's); copy the bundle there again")


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A file to be written, which then is `path`; where that fails there is none."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with folder.with_name(f"{folder.name}.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
