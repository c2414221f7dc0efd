"""What a run is expected to take: values alone. memory.py reckons them."""

from __future__ import annotations

from dataclasses import dataclass

from lfm_runtime.images.layout import ImageLayout
from lfm_runtime.report import memory_mib
from lfm_runtime.setup.costs import Costs

MIB = float(1 << 20)


@dataclass(frozen=True)
class Memory:
    """Of the process at its peak, MiB. What is mapped can be evicted and read again; what is anonymous cannot."""

    anonymous: float
    mapped: float

    @property
    def peak(self) -> float:
        """Resident memory in MiB, anonymous and mapped together."""
        return self.anonymous + self.mapped

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.anonymous + other.anonymous, self.mapped + other.mapped)

    @staticmethod
    def of_this_process() -> Memory:
        """Now: what a run starts from. To be taken before images are opened, which are reckoned apart."""
        found = memory_mib()
        return Memory(found["rss_anon"] or found["rss"] or 0.0, found["rss_file"] or 0.0)


@dataclass(frozen=True)
class Forecast:
    """What one run is expected to take: tokens, memory, disk."""

    images: tuple[ImageLayout, ...]
    image_tokens: int
    prompt_tokens: int
    new_tokens: int  # at most
    start: Memory  # what the process has before it
    memory: Memory  # at its peak
    disk_mib: float  # of weights
    address_mib: float = 0.0  # address space that the run adds, which `ulimit -v` limits

    @property
    def views(self) -> int:
        """Number of views that the vision encoder processes."""
        return sum(len(image.views) for image in self.images)

    def times_ms(self, costs: Costs, *, low_memory: bool) -> dict[str, float]:
        """Stages, first token and each further one, from what an audit measured; image and preprocess together."""
        opening = sum(
            costs.image_ms(image.width * image.height, sum(v.rows * v.columns for v in image.views))
            for image in self.images
        )
        vision = sum(costs.vision_ms(view.rows * view.columns) for image in self.images for view in image.views)
        prefill = costs.prefill_ms(self.prompt_tokens)
        first = opening + costs.load_ms + vision + prefill
        load = {"load": costs.load_ms} if low_memory else {}
        per_token = costs.inter_token_ms
        return {
            "image_preprocess": opening,
            **load,
            "vision": vision,
            "prefill": prefill,
            "ttft": first,
            "per_token": per_token,
        }
