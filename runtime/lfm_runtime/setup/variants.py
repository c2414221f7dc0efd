"""Which variants of a bundle a profile comes to."""

from __future__ import annotations

from lfm_profiles import Profile

from lfm_runtime.bundle import Bundle
from lfm_runtime.engine.gpu_wheel import CUDA
from lfm_runtime.errors import SettingError
from lfm_runtime.formats.contract import KV8


def choose_variants(bundle: Bundle, profile: Profile) -> tuple[str, str | None]:
    """(variant, the one whose decoder reads prompts) that a profile comes to with this bundle.

    Raises:
        SettingError: prefill, asked for by the user, has no effect.
    """
    variant = choose_variant(bundle, profile)
    return variant, _prefill(bundle, profile, variant)


def choose_variant(bundle: Bundle, profile: Profile) -> str:
    """The one the user named; the profile's first that is there; the bundle's first."""
    if profile.is_flag("variant"):
        name = profile.variant[0]
    else:
        name = next((v for v in profile.variant if v in bundle.variants), next(iter(bundle.variants)))
    if profile.kv == "int8" and not name.endswith(KV8) and (f"{name}{KV8}" in bundle.variants or profile.is_flag("kv")):
        return f"{name}{KV8}"
    return name


def _prefill(bundle: Bundle, profile: Profile, variant: str) -> str | None:
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
    if variant in (name, f"{name}{KV8}"):
        if asked:
            raise SettingError(f"prefill {name} has no effect beside the variant {variant}; leave it out")
        return None
    if variant.endswith(KV8) and not name.endswith(KV8) and f"{name}{KV8}" in bundle.variants:
        name = f"{name}{KV8}"
    alike = all((form in name) == (form in variant) for form in (KV8, "fp16"))
    return name if asked or (name in bundle.variants and alike) else None
