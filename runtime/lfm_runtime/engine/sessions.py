"""The graphs of one variant: which are in memory, since when and for how long."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from lfm_runtime.bundle import Bundle
from lfm_runtime.decode.decoder import Decoder
from lfm_runtime.decode.device_state import OrtMemory
from lfm_runtime.decode.graphs import DecoderSessions
from lfm_runtime.engine.execution import Execution
from lfm_runtime.engine.failures import failures_are_ours, is_onnxruntimes, reason
from lfm_runtime.engine.gpu import GpuError, check_placement, full, is_full, left_to_cpu, unusable
from lfm_runtime.engine.gpu_wheel import CUDA
from lfm_runtime.engine.loader import Loader, check_onnxruntime
from lfm_runtime.errors import BundleError, OutOfMemoryError, SettingError, command
from lfm_runtime.formats.contract import DECODER, EMBED_TOKENS, KV_SCALES, VISION_ENCODER, GraphSpec

_log = logging.getLogger(__name__)


class Sessions:
    """Loaded all at once, or with `low_memory` one stage at a time."""

    def __init__(
        self,
        bundle: Bundle,
        variant: str,
        prefill: str | None,
        execution: Execution,
        *,
        unpacked: Collection[Path] = (),
        verify: bool = False,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            bundle: the bundle.
            variant: whose graphs.
            prefill: another variant, whose decoder reads prompts.
            execution: how they are run.
            unpacked: graphs whose weights are used as the file has them.
            verify: hash all of what was prepared before it is used.

        Raises:
            BundleError: the bundle lacks a variant, or a graph needs another onnxruntime.
        """
        self.variant, self.prefill, self.execution = variant, prefill, execution
        _, self.paths = bundle.graphs(variant)
        self.prefill_path = bundle.graphs(prefill)[1][DECODER.stem] if prefill else None
        for path in (*self.paths.values(), *([self.prefill_path] if self.prefill_path else [])):
            check_onnxruntime(bundle, path)
        advice = command("prepare", bundle.folder, "--variant", variant, *(["--prefill", prefill] if prefill else []))
        self._bundle = bundle
        self._loader = Loader(bundle, execution, self.paths, advice, unpacked=unpacked, verify=verify)
        self._vision: ort.InferenceSession | None = None
        self._begun: dict[tuple[GraphSpec, Path], Future[ort.InferenceSession]] = {}
        self.decoder = Decoder(
            self._load_decoder,
            self.paths[DECODER.stem],
            facts=bundle.facts,
            shrink=execution.low_memory and execution.arena,
            memory=OrtMemory("cuda") if execution.on_gpu else None,
            longest=bundle.context_length,
        )

    @property
    def load_ms(self) -> dict[str, float]:
        """File → how long it took to load, the last time."""
        return self._loader.load_ms

    @property
    def is_prepared(self) -> bool:
        """Whether every graph loaded so far, the embedding table excepted, is as `lfm-edge prepare` wrote it."""
        return bool(self._loader.load_ms) and not self._loader.unprepared

    def load(self) -> None:
        """Load everything, the graphs side by side; with low_memory nothing yet."""
        if self.execution.low_memory:
            return
        self.begin()
        try:
            self.vision()
            self.decoder.load()
        finally:  # where one cannot be loaded, nothing of the others stays
            wait(self._begun.values())
            self._begun.clear()
        if self.execution.on_gpu:
            self._try_a_step()

    def begin(self) -> None:
        """Begin to load everything, the graphs side by side; who needs one waits for it, and gets its errors. With
        low_memory nothing begins.
        """
        if self.execution.low_memory:
            return
        graphs = [(VISION_ENCODER, self.paths[VISION_ENCODER.stem]), (DECODER, self.paths[DECODER.stem])]
        if self.prefill_path:
            graphs.append((DECODER, self.prefill_path))
        others = ThreadPoolExecutor(2, "load")  # the encoder is needed first: more at a time would delay it
        self._begun = {(graph, path): others.submit(self._loader.load, graph, path) for graph, path in graphs}
        others.shutdown(wait=False)

    def vision(self) -> ort.InferenceSession:
        """The vision encoder. With low_memory the decoder is released first, and the encoder is freed when the caller
        drops the session.
        """
        if self.execution.low_memory:
            self.decoder.release()
            return self._loaded(VISION_ENCODER, self.paths[VISION_ENCODER.stem])
        self._vision = self._vision or self._loaded(VISION_ENCODER, self.paths[VISION_ENCODER.stem])
        return self._vision

    def release(self) -> None:
        """Give back all memory of the graphs, a GPU's as well."""
        self.decoder.release()
        self._vision = None
        self._begun.clear()

    def identity(self) -> str:
        """Tells what these graphs compute from what others do, across processes."""
        paths = [*self.paths.values(), *([self.prefill_path] if self.prefill_path else [])]
        parts = [part for path in sorted(paths) for part in self._bundle.fingerprint(path)]
        return hashlib.sha256("\n".join([ort.__version__, *parts]).encode()).hexdigest()

    @contextmanager
    def failures_are_ours(self) -> Iterator[None]:
        """As the function, and where GPU memory runs out, the sizes."""
        try:
            with failures_are_ours(self._bundle.folder):
                yield
        except (BundleError, OutOfMemoryError) as e:
            if self.execution.on_gpu and is_full(reason(e.__cause__)):
                raise full(self.paths.values(), reason(e.__cause__)) from e
            raise

    def _loaded(self, graph: GraphSpec, path: Path) -> ort.InferenceSession:
        """A graph whose loading has begun, once it is there; else it is loaded now."""
        begun = self._begun.pop((graph, path), None)
        return begun.result() if begun else self._loader.load(graph, path)

    def _load_decoder(self) -> DecoderSessions:
        decoder = self._loaded(DECODER, self.paths[DECODER.stem])
        prefill = self._loaded(DECODER, self.prefill_path) if self.prefill_path else None
        if prefill and _form_of_states(prefill) != _form_of_states(decoder):
            raise SettingError(
                f"the KV cache formats of {self.prefill_path} and of {self.variant}'s decoder differ; use two "
                "-kv8 variants quantized with the same images, two fp16 variants, or two that are neither"
            )
        embed = self._loader.load(EMBED_TOKENS, self.paths[EMBED_TOKENS.stem])
        return DecoderSessions(decoder, embed, prefill, self.execution.on_gpu and self._all_on_device(decoder, embed))

    def _all_on_device(self, decoder: ort.InferenceSession, embed: ort.InferenceSession) -> bool:
        """Whether nothing of the decode loop is left to the CPU; what is, the user is told."""
        found = []
        for graph, session in ((DECODER, decoder), (EMBED_TOKENS, embed)):
            path = self.paths[graph.stem]
            found.append(left_to_cpu(session, path))
            if said := check_placement(found[-1], path, strict=self.execution.strict_placement):
                _log.warning("lfm-edge: %s", said)
        return found == [[], []]

    def _try_a_step(self) -> None:
        """On a GPU the first tokens in new buffers are captured, one for each turn, which takes time and can fail;
        better now. Where it does, steps are run uncaptured.
        """
        failure = self._failure_of_a_step()
        if failure and self.execution.cuda_graphs and not is_full(failure):
            self.execution = self._loader.execution = replace(self.execution, cuda_graphs=False)
            self.decoder.release()
            captured, failure = failure, self._failure_of_a_step()
            if not failure:
                _log.warning("lfm-edge: steps are run without CUDA graphs: %s", captured[:300])
        if failure:
            raise self._explained(failure)

    def _failure_of_a_step(self) -> str | None:
        """As words: the exception holds on to the session, whose weights would be in memory twice once it is loaded
        again.
        """
        try:
            state = self.decoder.start(1)
            for _ in range(2):
                state.step_token(0)
        except Exception as e:
            if not is_onnxruntimes(e):
                raise
            return reason(e)
        return None

    def _explained(self, failure: str) -> GpuError:
        path = self.paths[DECODER.stem]
        return full(self.paths.values(), failure) if is_full(failure) else unusable(path, CUDA, failure)


def _form_of_states(decoder: ort.InferenceSession) -> tuple[Any, ...]:
    """What two decoders must share to go on with each other's states: their types, and the scales of int8 ones."""
    types = sorted((i.name, i.type) for i in decoder.get_inputs() if i.name.startswith("past_"))
    return decoder.get_modelmeta().custom_metadata_map.get(KV_SCALES), *types
