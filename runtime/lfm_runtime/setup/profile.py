"""Which profile holds: the one named, else LFM_EDGE_PROFILE's, else the one packed with the bundle, else the one that
fits this machine; and the user's flags beside it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

from lfm_profiles import Choice, Profile, ProfileError, choose, read, with_flags
from lfm_profiles.schema import AUTO, FLAG, GENERATION_SETTINGS, IMAGE_SETTINGS, TILE_SETTINGS

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.sampling import GenerationSettings
from lfm_runtime.engine.gpu_wheel import CUDA
from lfm_runtime.errors import SettingError
from lfm_runtime.formats.manifest import PROFILE
from lfm_runtime.images.layout import ImageSettings
from lfm_runtime.setup.machine import this_machine

_log = logging.getLogger(__name__)
VARIABLE = "LFM_EDGE_PROFILE"


def detected() -> Choice:
    """The shipped profile that fits this machine and this onnxruntime; one for the CPU where a GPU cannot be used,
    which is said.
    """
    machine = this_machine()
    if CUDA in machine.providers and machine.gpu_problem:
        _log.warning("lfm-edge: computing on the CPU: %s", machine.gpu_problem)
    return choose(machine.device, machine.usable_providers)


def find_profile(name: str | os.PathLike[str] | Profile = "", **flags: Any) -> Profile:
    """The profile with the flags, each a setting's name (see profiles/README.md); None is not given.

    Raises:
        SettingError: no such profile, something wrong in its file, or a flag that is unknown, impossible or without
            effect.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    if isinstance(given.get("variant"), str):
        given["variant"] = (given["variant"],)
    wanted = "" if isinstance(name, Profile) else os.fspath(name) or default_name()
    try:
        if not isinstance(name, Profile):
            name = (
                replace(detected().profile, automatic=True)
                if wanted == AUTO
                else read(wanted, detected=lambda: detected().profile)
            )
        return with_flags(name, given)
    except ProfileError as e:
        by = f"{VARIABLE}: " if wanted and wanted == os.environ.get(VARIABLE) else ""
        raise SettingError(f"{by}{e}") from e


def default_name(bundle: Bundle | None = None) -> str:
    """The profile that holds where none is named: its name or its file."""
    packed = str(bundle.folder / PROFILE) if bundle and PROFILE in bundle.files else ""
    return os.environ.get(VARIABLE) or packed or AUTO


def on_cpu(profile: Profile) -> Profile:
    """What would have been chosen without a GPU, with the user's flags."""
    flags = {name: getattr(profile, name) for name, who in profile.origin.items() if who == FLAG}
    machine = this_machine()
    providers = [name for name in machine.providers if name != CUDA]
    return find_profile(choose(machine.device, providers).profile, **flags)


def image_changes(profile: Profile, checkpoint: ImageSettings) -> dict[str, Any]:
    """What of the checkpoint's image settings the profile changes. A profile asks for less than the checkpoint, never
    for more: a fine-tune that does not tile, or was trained on small views, stays as it is. The user's flags hold as
    they are.
    """
    given = {
        name: value if profile.is_flag(name) else min(value, getattr(checkpoint, name))  # false is less than true
        for name, value in profile.given(*IMAGE_SETTINGS).items()
    }
    splitting = given.get("do_image_splitting", checkpoint.do_image_splitting)
    given = {
        name: value for name, value in given.items() if splitting or name not in TILE_SETTINGS or profile.is_flag(name)
    }
    for low, high in (("min_image_tokens", "max_image_tokens"), ("min_tiles", "max_tiles")):
        if (
            low in given
            and high in given
            and given[low] > given[high]
            and profile.is_flag(low) != profile.is_flag(high)
        ):
            del given[low if profile.is_flag(high) else high]  # the user's stands
    return given


def generation_changes(profile: Profile, checkpoint: GenerationSettings, *, verifies: bool) -> dict[str, Any]:
    """The same of the generation settings. `verifies`: the decoder can take speculative tokens back."""
    given = profile.given(*GENERATION_SETTINGS)
    if "max_new_tokens" in given and not profile.is_flag("max_new_tokens"):
        given["max_new_tokens"] = min(given["max_new_tokens"], checkpoint.max_new_tokens)
    if not verifies and not profile.is_flag("speculate"):
        given.pop("speculate", None)
    return given


def departures(profile: Profile, images: ImageSettings, generation: GenerationSettings | None = None) -> list[str]:
    """What a profile changes of a checkpoint's settings, a few words each: "max_image_tokens 128 instead of 256"."""
    found = []
    changed: list[tuple[dict[str, Any], Any]] = [(image_changes(profile, images), images)]
    if generation:
        changed.append((generation_changes(profile, generation, verifies=False), generation))
    for changes, checkpoint in changed:
        for name, value in changes.items():
            old = getattr(checkpoint, name)
            if value != old:
                words = [("on" if v else "off") if isinstance(v, bool) else str(v) for v in (value, old)]
                found.append(f"{name} {words[0]} instead of {words[1]}")
    return found


def on_this_machine(profile: Profile) -> Profile:
    """A device's profile without what is its hardware's: cores and a GPU. Variants and image settings stay."""
    return replace(profile, providers=("CPUExecutionProvider",), affinity="none", threads=None)
