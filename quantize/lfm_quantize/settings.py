"""What the user asks of one run of quantize."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lfm_profiles import SMALLER, VARIANTS, Profile

from lfm_quantize.graph import QuantizeError
from lfm_quantize.rounding import COMPENSATING, METHODS


@dataclass(frozen=True)
class Settings:
    """What the user asks for. Without calibration images weights are rounded blindly, and nothing can be judged."""

    variant: str
    calibration: tuple[Path, ...] = ()  # folders, image files, or text files of paths
    prompts: Path | None = None
    method: str | None = None
    recipe: Path | None = None
    keep: tuple[str, ...] = ()
    floor: float | None = None
    max_size: float | None = None  # MB
    threads: int = 2
    quick: bool = False
    force: bool = False  # replace a variant that was calibrated, or not quickly, by one that is less
    scheduler: str | None = None  # of a Dask cluster, that calibrates
    profile: Profile | None = None  # of the device whose image settings and prefill decoder it is judged with

    def check(self) -> None:
        """Raise QuantizeError for what could not be done or would have no effect."""
        if self.variant not in VARIANTS:
            raise QuantizeError(
                f"unknown variant {self.variant!r}; allowed: {', '.join(v for v in VARIANTS if v != 'fp32')}"
            )
        if self.method is not None and self.method not in METHODS:
            raise QuantizeError(f"unknown method {self.method!r}; allowed: {', '.join(METHODS)}")
        if not self.rounds() and (self.method or self.recipe):
            raise QuantizeError(f"--method and --recipe have no effect on {self.variant}; leave them out")
        if VARIANTS[self.variant].needs_images and not self.calibration:
            raise QuantizeError(f"{self.variant} needs --calibration: its ranges are measured on the images")
        if self.keeps_weights() and self.keep:
            raise QuantizeError(
                f"--keep has no effect on {self.variant}, whose weights are another variant's; leave it out"
            )
        if self.recipe and self.method:
            raise QuantizeError("--method has no effect beside --recipe, which names the methods; leave one out")
        if self.method in COMPENSATING and not self.calibration:
            raise QuantizeError(
                f"--method {self.method} needs --calibration: it uses the activations that the images cause"
            )
        if self.prompts and not self.calibration:
            raise QuantizeError("--prompts has no effect without --calibration; name the images' folder")
        if self.quick and not self.calibration:
            raise QuantizeError("--quick has no effect without --calibration, of whose images it takes fewer")
        if self.quick and not self.rounds():
            raise QuantizeError(f"--quick has no effect on {self.variant}; leave it out")
        if self.quick and (self.method or self.recipe or self.max_size):
            raise QuantizeError(
                "--quick chooses the methods; leave it out, or leave out --method, --recipe and --max-size"
            )
        if self.scheduler and not self.calibration:
            raise QuantizeError("--scheduler has no effect without --calibration, which is done there")
        if self.profile and not self.calibration:
            raise QuantizeError("--profile has no effect without --calibration, which the variant is judged with")
        if self.floor is not None and not (self.calibration and 0 < self.floor < math.inf):
            raise QuantizeError("--floor needs --calibration and a KL divergence above 0, such as 0.01")
        if self.max_size is not None and not (
            self.calibration and self.variant == "int4" and not self.recipe and not self.method
        ):
            raise QuantizeError(
                "--max-size searches precisions: it needs --variant int4 and --calibration, and no --recipe or --method"
            )
        if self.max_size is not None and not 0 < self.max_size < math.inf:
            raise QuantizeError(f"--max-size {self.max_size:g} is impossible; allowed: megabytes above 0")

    def kl_floor(self) -> float:
        """Highest KL divergence allowed: the user's, or the variant's default."""
        return self.floor or VARIANTS[self.variant].floor

    def rounds(self) -> bool:
        """Whether weights become integers, by a recipe."""
        return self.variant in SMALLER

    def keeps_weights(self) -> bool:
        """Whether it is another variant's weights in other graphs."""
        return bool(VARIANTS[self.variant].bases)

    def searches(self) -> bool:
        """Whether the recipe is to be found: int4 within a size or a floor of quality."""
        given = self.recipe is not None or self.method is not None or self.quick
        return self.variant == "int4" and not given and (self.max_size is not None or self.floor is not None)
