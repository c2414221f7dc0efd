"""What every step of one run works with, and what a run makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from lfm_runtime.bundle import Bundle
from numpy.typing import NDArray

from lfm_quantize.calibrate.answers import Answering, Progress
from lfm_quantize.calibrate.blocks import image_positions
from lfm_quantize.calibrate.samples import Sample
from lfm_quantize.calibrate.spread import Cluster
from lfm_quantize.recipe import Recipe
from lfm_quantize.settings import Settings
from lfm_quantize.source import Source
from lfm_quantize.variant import VariantGraphs
from lfm_quantize.work import Work


@dataclass(frozen=True)
class Made:
    """A variant's graphs, and how they were made, for the manifest."""

    graphs: VariantGraphs
    record: dict[str, Any]
    recipe: Recipe | None = None  # where weights became integers


@dataclass(frozen=True)
class Run:
    """One run: what is asked, what there is, and the samples to calibrate with."""

    settings: Settings
    bundle: Bundle
    source: Source
    recipe: Recipe | None
    samples: list[Sample]
    work: Work
    progress: Progress
    cluster: Cluster

    @property
    def exact(self) -> Answering:
        """The variant that the source is of, answering."""
        return Answering(self.bundle, self.source.variant, self.settings.threads, packed=False)

    def image_positions(self) -> list[NDArray[np.bool_]]:
        """For each sample, which of its tokens are image tokens."""
        return image_positions(self.samples, self.bundle.prompts.image_id)

    def files(self, variant: str) -> VariantGraphs:
        """The graph files of a variant that is there, by stem."""
        found = self.bundle.graphs(variant)[1]
        return {stem: path.relative_to(self.bundle.folder).as_posix() for stem, path in found.items()}
