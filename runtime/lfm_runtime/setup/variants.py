"""Chooses the variants of a bundle that a profile comes to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from lfm_profiles import VARIANTS, Profile

from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.gpu_wheel import CUDA
from lfm_runtime.errors import SettingError, command


def choose_variants(variants: Collection[str], profile: Profile) -> tuple[str, str | None]:
    """(variant, the one whose decoder reads prompts) that a profile comes to with a bundle's variants.

    Raises:
        SettingError: prefill, asked for by the user, has no effect, or cannot be.
    """
    variant = choose_variant(variants, profile)
    return variant, _prefill(variants, profile, variant)


def choose_variant(variants: Collection[str], profile: Profile) -> str:
    """The one the user named; the profile's first that is there; the bundle's first."""
    if profile.is_flag("variant"):
        name = profile.variant[0]
    else:
        name = next((v for v in profile.variant if v in variants), next(iter(variants)))
    other = VARIANTS[name].int8_keys
    if profile.kv == "int8" and other and (other in variants or profile.is_flag("kv")):
        return other
    return name


def _prefill(variants: Collection[str], profile: Profile, variant: str) -> str | None:
    """The variant whose decoder reads prompts. A profile's wish that cannot be met is none; the user's is an error."""
    name, asked = profile.prefill, profile.is_flag("prefill")
    if name in (None, "none") or profile.low_memory:
        return None
    if CUDA in profile.providers:
        if asked:
            raise SettingError(
                f"prefill {name} has no effect on a GPU, whose decoder reads prompts as well; leave it out"
            )
        return None
    row, other = VARIANTS[variant], VARIANTS[name]
    if other.has_decoder_of(row):
        if asked:
            raise SettingError(f"prefill {name} has no effect beside the variant {variant}; leave it out")
        return None
    if profile.is_flag("variant") and row.weights not in ("int8", "int4") and not asked:
        return None  # who names float weights means them for the prompt as well
    if row.keys == "int8" and other.int8_keys in variants:
        other = VARIANTS[other.int8_keys or name]
    if asked and other.name in variants and not other.shares_states_with(row):
        raise SettingError(
            f"prefill {other.name} cannot read prompts for {variant}: their KV caches have different numbers; use two "
            "-kv8 variants quantized with the same images, two fp16 variants, or two that are neither"
        )
    return other.name if asked or (other.name in variants and other.shares_states_with(row)) else None


def unmet(bundle: Bundle, profile: Profile) -> list[str]:
    """Variants that a profile would rather use, and the bundle does not have: the best decoder, the prefill decoder."""
    variant, prefill = choose_variants(bundle.variants, profile)
    found = []
    if profile.variant and variant != profile.variant[0] and VARIANTS[variant].float_keys != profile.variant[0]:
        found.append(profile.variant[0])
    wish = profile.prefill
    if wish and not prefill and _prefill({*bundle.variants, wish}, profile, variant) == wish:
        found.append(wish)  # it would be used if it were there
    return [name for name in dict.fromkeys(found) if name not in bundle.variants]


def made_with(bundle: Bundle, variant: str, folder: str | Path | None = None) -> str:
    """The command that makes a variant as the bundle's others were made: calibrated where one of them is. `folder`:
    what to call the bundle.
    """
    made = [how.get("calibration") for how in bundle.manifest.quantization.values()] if bundle.manifest else []
    calibrated = any(isinstance(of, Mapping) and of.get("images") for of in made)
    images = ("--calibration", "PHOTOS") if calibrated else ()
    return command("quantize", folder or bundle.folder, "--variant", variant, *images)
