"""The graphs of a decoder: token embeddings, the decoder, and the prefill decoder where there is one. They are loaded
when first used, and again after a release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lfm_runtime.decode.info import DecoderInfo
from lfm_runtime.decode.state import Embeds
from lfm_runtime.formats.contract import EMBED_TOKENS
from lfm_runtime.formats.edges import numpy_type
from lfm_runtime.formats.manifest import ModelFacts


@dataclass(frozen=True)
class DecoderSessions:
    """Loaded. `prefill` computes the same model from other weights, for steps of many tokens."""

    decoder: ort.InferenceSession
    embed: ort.InferenceSession
    prefill: ort.InferenceSession | None = None
    all_on_device: bool = False  # no operator of a step is left to the CPU while the others run on a device


class DecoderGraphs:
    """The sessions and run options that all states of one decoder share."""

    def __init__(
        self, load: Callable[[], DecoderSessions], path: Path, *, facts: ModelFacts | None = None, shrink: bool = False
    ) -> None:
        """`path`: of the decoder's graph; `facts`: sizes that it may leave open; `shrink`: after a step of many tokens
        its memory goes back to the operating system.
        """
        self.path = path
        self._facts = facts
        self._load = load
        self._sessions: DecoderSessions | None = None
        self._info: DecoderInfo | None = None
        self.many_options = ort.RunOptions()
        self.uncaptured = ort.RunOptions()  # for runs whose addresses differ: a GPU's provider would replay the first
        self.uncaptured.add_run_config_entry("gpu_graph_id", "-1")
        if shrink:
            self.many_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def load(self) -> DecoderSessions:
        """Return the sessions, which are loaded now if they are not."""
        if self._sessions is None:
            self._sessions = self._load()
            self._info = DecoderInfo.of(self._sessions.decoder, self.path, self._facts)
            embed = self._sessions.embed
            inputs = {i.name: i for i in embed.get_inputs()}
            self._ids_type = numpy_type(inputs["input_ids"])
            self._no_images = {
                name: np.empty((0, self._info.hidden), numpy_type(inputs[name]))
                for name in EMBED_TOKENS.optional_inputs
                if name in inputs
            }
            self._embeds = [str(EMBED_TOKENS.output([o.name for o in embed.get_outputs()]))]
        return self._sessions

    @property
    def is_loaded(self) -> bool:
        """Whether the sessions are in memory."""
        return self._sessions is not None

    @property
    def info(self) -> DecoderInfo:
        """Shapes and abilities of the decoder, which is loaded the first time."""
        if self._info is None:
            self.load()
        assert self._info is not None
        return self._info

    def release(self) -> None:
        """Drop the sessions, which gives back their memory; the next use loads them again."""
        self._sessions = None

    def embed(self, ids: Sequence[int]) -> Embeds:
        """Return the embeddings float32 [1, tokens, H] of `ids`."""
        session = self.load().embed
        (embeds,) = session.run(
            self._embeds, {"input_ids": np.array([ids], self._ids_type), **self._no_images}, self.uncaptured
        )
        return np.asarray(embeds, np.float32)

    def embed_prompt(self, ids: Sequence[int], features: NDArray[np.float32], image_id: int) -> Embeds:
        """Embeddings [1, tokens, H] with image features [image tokens, H] in the image tokens' places."""
        self.load()
        # A graph that puts features in itself gets none, so it may see no image token; they are put in below.
        embeds = self.embed([0 if i == image_id else i for i in ids] if self._no_images else ids)
        if len(features):
            embeds[0, np.array(ids) == image_id] = features
        return embeds
