"""A decoder: its graphs, and the states that sequences begin with, in the form that suits the graph and the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

from lfm_runtime.decode.device_state import DeviceLoop, DeviceState, Memory
from lfm_runtime.decode.graphs import DecoderGraphs, DecoderSessions
from lfm_runtime.decode.state import Snapshot, State
from lfm_runtime.decode.states import ConcatenatedState, SharedState
from lfm_runtime.formats.manifest import ModelFacts


class Decoder(DecoderGraphs):
    """The graphs of a decoder, and the states that its sequences begin with."""

    def __init__(
        self,
        load: Callable[[], DecoderSessions],
        path: Path,
        *,
        facts: ModelFacts | None = None,
        shrink: bool = False,
        memory: Memory | None = None,
        longest: int = 0,
    ) -> None:
        """`memory`: of the device that the sessions compute on, where it is not this process's; `longest`: tokens it
        has positions for.
        """
        super().__init__(load, path, facts=facts, shrink=shrink)
        self.longest = longest
        self._memory = memory
        self._loop: DeviceLoop | None = None
        self._bound: weakref.WeakSet[SharedState] = weakref.WeakSet()

    @property
    def verifies(self) -> bool:
        """Whether speculative tokens can be taken back. On a device, where a step of many tokens takes hardly longer
        than one, what its convolutions read would cross to the host.
        """
        return self._memory is None and self.info.verifies

    def release(self) -> None:
        """Give back the graphs' memory. States stay valid, but for those on a device: their buffers are bound to its
        sessions.
        """
        for state in self._bound:
            state.unbind()
        self._loop = None
        super().release()

    def start(self, capacity: int, after: Snapshot | None = None) -> State:
        """State for at most `capacity` tokens, prompt and answer together; fresh, or where a snapshot was taken."""
        if not self.info.shares_kv:
            return ConcatenatedState(self, capacity, after)
        if self._memory:
            self._loop = self._loop or DeviceLoop(self, self._memory, self.longest)
            return DeviceState(self._loop, capacity, after)
        state = SharedState(self, capacity, after)
        self._bound.add(state)
        return state
