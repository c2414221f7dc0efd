"""Which profile holds: the one named, else LFM_EDGE_PROFILE's, else the one that fits this machine; and the user's
flags beside it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import onnxruntime as ort
from lfm_profiles import VARIANTS, Choice, Profile, ProfileError, choose, detect, read, with_flags
from lfm_profiles.schema import AUTO, FLAG, GENERATION_SETTINGS, IMAGE_SETTINGS, TILE_SETTINGS

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.sampling import GenerationSettings
from lfm_runtime.engine.gpu import GpuError, check_memory, check_tensorrt
from lfm_runtime.engine.gpu_wheel import CUDA, TENSORRT, gpu_problem
from lfm_runtime.errors import SettingError
from lfm_runtime.formats.contract import VISION_ENCODER
from lfm_runtime.images import ImageSettings
from lfm_runtime.setup.variants import choose_variant

_log = logging.getLogger(__name__)
VARIABLE = "LFM_EDGE_PROFILE"


def detected() -> Choice:
    """The shipped profile that fits this machine and this onnxruntime; one for the CPU where a GPU cannot be used,
    which is said.
    """
    device, providers = detect(), ort.get_available_providers()
    if CUDA in providers and (problem := gpu_problem(device)):
        _log.warning("lfm-edge: computing on the CPU: %s", problem)
        providers.remove(CUDA)
    return choose(device, providers)


def find_profile(name: str | os.PathLike[str] | Profile = "", **flags: Any) -> Profile:
    """The profile with the flags, each a setting's name (see profiles/README.md); None is not given.

    Raises:
        SettingError: no such profile, something wrong in its file, or a flag that is unknown, impossible or without
            effect.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    if isinstance(given.get("variant"), str):
        given["variant"] = (given["variant"],)
    try:
        if not isinstance(name, Profile):
            wanted = os.fspath(name) or os.environ.get(VARIABLE) or AUTO
            name = (
                replace(detected().profile, automatic=True)
                if wanted == AUTO
                else read(wanted, detected=lambda: detected().profile)
            )
        return with_flags(name, given)
    except ProfileError as e:
        raise SettingError(str(e)) from e


def profile_for(bundle: Bundle, name: str | os.PathLike[str] | Profile = "", **flags: Any) -> Profile:
    """find_profile, for a bundle: where nobody named a profile and its GPU cannot compute this bundle, it is the CPU's,
    and that is said.

    Raises:
        GpuError: the GPU of a profile that was named cannot be used, as a whole or for this bundle.
        SettingError: see find_profile.
    """
    profile = find_profile(name, **flags)
    if CUDA in profile.providers:
        try:
            _check_gpu(bundle, profile)
        except GpuError as e:
            if not profile.automatic:
                raise
            _log.warning("lfm-edge: computing on the CPU: %s", e)
            return on_cpu(profile)
    return profile


def _check_gpu(bundle: Bundle, profile: Profile) -> None:
    """Raise GpuError where this GPU cannot compute this bundle, SettingError for what a GPU does not do."""
    os.environ.setdefault(
        "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
    )  # as nvidia-smi counts, or another card's memory would be looked at
    if problem := gpu_problem(detect()):
        raise GpuError(
            f"profile {profile.name} needs a GPU: {problem}; choose another profile: --profile auto takes what fits"
        )
    name = choose_variant(bundle, profile)
    if not VARIANTS[name].on_gpu and not profile.is_flag("variant"):
        raise GpuError(
            f"{bundle.folder} has no variant that a GPU computes as a whole, only {', '.join(bundle.variants)}; "
            "make one: "
            f"lfm-edge quantize {bundle.folder} --variant {profile.variant[0]}"
        )
    if TENSORRT in profile.providers:
        check_tensorrt(bundle.graphs(name)[1][VISION_ENCODER.stem])
    if profile.low_memory:
        raise SettingError(
            "low_memory is for the CPU: on a GPU the graphs stay loaded; leave it out, or take a smaller variant"
        )
    check_memory(bundle.graphs(name)[1].values())


def on_cpu(profile: Profile) -> Profile:
    """What would have been chosen without a GPU, with the user's flags."""
    flags = {name: getattr(profile, name) for name, who in profile.origin.items() if who == FLAG}
    providers = [name for name in ort.get_available_providers() if name != CUDA]
    return find_profile(choose(detect(), providers).profile, **flags)


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
    """The same of the generation settings. `verifies`: the decoder can take guessed tokens back."""
    given = profile.given(*GENERATION_SETTINGS)
    if "max_new_tokens" in given and not profile.is_flag("max_new_tokens"):
        given["max_new_tokens"] = min(given["max_new_tokens"], checkpoint.max_new_tokens)
    if not verifies and not profile.is_flag("speculate"):
        given.pop("speculate", None)
    return given
