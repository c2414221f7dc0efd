"""The samples on their way through the blocks of a graph. Each part of them is led where it is, here or on a worker of
a cluster: what comes back are sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from lfm_runtime.bundle import Bundle
from numpy.typing import NDArray

from lfm_quantize.calibrate.blocks import Block, FedGraph, Feeds, Values, image_positions, prompt_feeds
from lfm_quantize.calibrate.observe import Observed, observe
from lfm_quantize.calibrate.samples import Sample, to_sample
from lfm_quantize.calibrate.spread import HERE, Cluster, Sent, SharedBundle, received, sent
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.positions import AllPositions
from lfm_quantize.rounding import Rounded
from lfm_quantize.source import Source

LEAST_IMAGES = 4
"""In a part: its blocks' weights are read once for them."""


@dataclass(frozen=True)
class Graphs:
    """What samples are led through."""

    vision: ir.Model
    decoder: ir.Model  # with the logits of every position
    table: NDArray[np.float32]  # [V, H]

    @staticmethod
    def of(source: Source) -> Graphs:
        """The graphs that quantizing starts from."""
        return Graphs(source.vision, rewritten(source.decoder, AllPositions()), source.table)


Opened = Callable[[], Graphs]
Asked = Callable[[], list[tuple[int, Sample]]]
"""Samples with their answers, and their numbers in the whole run."""


@dataclass(frozen=True)
class Part:
    """Some of the samples, before a block of a graph. It stays where it was made; advancing gives another one."""

    opened: Opened
    feeds: list[Feeds]
    kinds: list[NDArray[np.bool_]]  # which rows are image tokens
    numbers: list[tuple[int, int]]  # of each of the feeds in the whole run
    of: int  # feeds in the whole run
    threads: int
    states: list[Values]
    samples: list[tuple[int, Sample]] = field(default_factory=list)  # of the encoder's part, with their numbers
    decoder: bool = False

    def __sizeof__(self) -> int:
        """In memory: Dask moves and spills by it."""
        arrays = [array for values in (*self.feeds, *self.states) for array in values.values()]
        return sum(array.nbytes for array in arrays)

    def fed(self) -> FedGraph:
        """The graph with these inputs."""
        graphs = self.opened()
        model = graphs.decoder if self.decoder else graphs.vision
        return FedGraph(model, self.feeds, self.kinds, self.threads, self.numbers, self.of)


@dataclass(frozen=True)
class Trail:
    """All samples before a block of a graph."""

    cluster: Cluster
    parts: list[Any]  # Part, or where the cluster has it

    def observe(self, block: Block, with_moments: Mapping[str, bool]) -> dict[str, Observed]:
        """What the products named in `with_moments` are fed, with second moments where it says so; empty without
        samples.
        """
        seen: dict[str, Observed] = {}
        if not with_moments:
            return seen
        for found in self._each(_observe, block, with_moments):
            for name, observed in found.items():
                if name in seen:
                    seen[name].merge(observed)
                else:
                    seen[name] = observed
        return seen

    def tried(self, function: Callable[..., float], block: Block, *more: Any) -> float | None:
        """What a function of (graph with inputs, states, block, …) gives for the first part; None without samples."""
        return next(self._each(_tried, function, block, *more, parts=self.parts[:1]), None)

    def advance(self, block: Block, change: Sequence[ir.passes.InPlacePass]) -> Trail:
        """The samples behind the block, which `change` has quantized."""
        shared = self.cluster.share(change) if self.parts else change
        after = replace(self, parts=[self.cluster.call(_advance, part, block, shared) for part in self.parts])
        after.wait()  # until the change is used: the next one has as many weights
        return after

    def wait(self) -> None:
        """Return when every part has arrived."""
        for _ in self._each(_arrived):
            pass

    def into_decoder(self, samples: int, table: Rounded | None, image_id: int) -> Trail:
        """The same samples, `samples` in all, before the decoder, fed what the encoder gave, and rows of the embedding
        table: rounded, or the source's.
        """
        shared = self.cluster.share(table) if self.parts else table
        parts = [self.cluster.call(_into_decoder, part, samples, shared, image_id) for part in self.parts]
        return replace(self, parts=parts)

    def _each(self, function: Callable[..., Any], *more: Any, parts: list[Any] | None = None) -> Iterator[Any]:
        parts = self.parts if parts is None else parts
        return self.cluster.results([self.cluster.call(function, part, *more) for part in parts], large=True)


def into_encoder(
    cluster: Cluster, bundle: Bundle, asked: str, graphs: Graphs, samples: Sequence[Sample], threads: int
) -> Trail:
    """The samples before the encoder's first block: each image's whole view once, and its extra views.

    Args:
        cluster: where they are led; its workers have the bundle and the images under the same paths.
        bundle: that the graphs are of.
        asked: the variant to make.
        graphs: here.
        samples: with their answers.
        threads: of each session.
    """
    if not samples:
        return Trail(cluster, [])
    numbered = [*enumerate(samples)]
    first = _by_image(numbered)
    views, images = sum(1 + len(sample.extra) for _, sample in first.values()), [*first]
    if cluster is HERE:
        return Trail(cluster, [_into_encoder(lambda: graphs, lambda: numbered, views, threads)])
    shared = SharedBundle.of(bundle.folder)
    count = max(1, min(cluster.size, len(images) // LEAST_IMAGES))
    parts = []
    for some in np.array_split(np.arange(len(images)), count):
        wanted = {images[i] for i in some}
        told = [(i, sent(s.question), s.ids) for i, s in numbered if s.question.image in wanted]
        asks = partial(_read, shared, told)
        parts.append(cluster.call(_into_encoder, _There(shared, asked), asks, views, threads))
    return Trail(cluster, parts)


# --------------------------------------------------------------------------------------------- where the parts are


class _There:
    """Opens the graphs of a bundle where it is called, once; they go with the parts that have it."""

    def __init__(self, shared: SharedBundle, asked: str) -> None:
        self._of = shared, asked
        self._graphs: Graphs | None = None

    def __call__(self) -> Graphs:
        if self._graphs is None:
            shared, asked = self._of
            self._graphs = Graphs.of(Source.open(shared.open(), asked))
        return self._graphs

    def __reduce__(self) -> tuple[type[_There], tuple[SharedBundle, str]]:
        return _There, self._of


def _read(shared: SharedBundle, told: Sequence[tuple[int, Sent, list[int]]]) -> list[tuple[int, Sample]]:
    """Samples made of their questions."""
    bundle = shared.open()
    return [
        (number, replace(to_sample(bundle, question, split=False), ids=ids))
        for (number, _, ids), question in zip(told, received([one for _, one, _ in told]), strict=True)
    ]


def _by_image(samples: Sequence[tuple[int, Sample]]) -> dict[Path, tuple[int, Sample]]:
    """The first of the samples about each image, in their order: several questions may be about one."""
    first: dict[Path, tuple[int, Sample]] = {}
    for number, sample in samples:
        first.setdefault(sample.question.image, (number, sample))
    return first


def _into_encoder(opened: Opened, asked: Asked, of: int, threads: int) -> Part:
    samples = asked()
    first = _by_image(samples)
    views = [(sample.views[0], (number, 0)) for number, sample in first.values()]
    views += [(view, (number, i)) for number, sample in first.values() for i, view in enumerate(sample.extra, 1)]
    kinds = [np.ones(len(view.patches), np.bool_) for view, _ in views]
    feeds, numbers = [view.feeds() for view, _ in views], [number for _, number in views]
    return Part(opened, feeds, kinds, numbers, of, threads, [{} for _ in views], samples)


def _into_decoder(encoded: Part, of: int, table: Rounded | None, image_id: int) -> Part:
    graphs = encoded.opened()
    samples = [sample for _, sample in encoded.samples]
    images = {image: i for i, image in enumerate(_by_image(encoded.samples))}  # their whole views come first
    features = [encoded.states[images[sample.question.image]]["image_features"] for sample in samples]
    kinds = image_positions(samples, image_id)
    feeds = prompt_feeds(graphs.decoder, samples, kinds, graphs.table if table is None else table, features)
    numbers = [(number, 0) for number, _ in encoded.samples]
    return Part(encoded.opened, feeds, kinds, numbers, of, encoded.threads, [{} for _ in feeds], decoder=True)


def _observe(part: Part, block: Block, with_moments: Mapping[str, bool]) -> dict[str, Observed]:
    return observe(part.fed(), block, part.states, with_moments)


def _tried(part: Part, function: Callable[..., float], *more: Any) -> float:
    return function(part.fed(), part.states, *more)


def _arrived(part: Part) -> int:
    return len(part.states)


def _advance(part: Part, block: Block, change: Sequence[ir.passes.InPlacePass]) -> Part:
    fed = part.fed()
    after = fed.rewritten(*change).run(block, part.states)
    fed.release()
    return replace(part, states=after)
