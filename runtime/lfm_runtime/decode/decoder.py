"""The decode loop's engine room: token embeddings in, logits out, state carried from step to step.

Forms of state. Shared: past and present of each attention layer are one buffer (GroupQueryAttention writes in place),
and two sets of convolution states swap roles each step; nothing large is allocated or copied per token. The same on a
GPU: device_state.py.
Concatenated: the plain past → present form, for graphs without GroupQueryAttention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lfm_runtime.decode.device_state import DeviceLoop, DeviceState, Memory
from lfm_runtime.decode.state import Embeds, Mark, Snapshot, State, StateInput
from lfm_runtime.errors import GraphContractError
from lfm_runtime.formats.contract import CONV_WINDOW, MANY_TOKENS, POSITIONS, present_name

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


PREFILL_TOKENS = 8
"""From so many tokens a step is bound by arithmetic rather than by reading weights, and int8's decoder is faster than
int4's (measured: 37 ms against 34 for 8 tokens of a 450M, 24 against 27 for 4).
"""


@dataclass(frozen=True)
class DecoderSessions:
    """The graphs a decoder runs. `prefill` computes the same model from other weights, for steps of many tokens."""

    decoder: ort.InferenceSession
    embed: ort.InferenceSession
    prefill: ort.InferenceSession | None = None
    all_on_device: bool = False  # no operator of a step is left to the CPU while the others run on a device


class Decoder:
    """The decoder and embedding graphs of one model. They are loaded when first used, and again after a release."""

    def __init__(
        self,
        load: Callable[[], DecoderSessions],
        path: Path,
        *,
        shrink: bool = False,
        memory: Memory | None = None,
        longest: int = 0,
    ) -> None:
        """`memory`: of the device that the sessions compute on, where it is not this process's; `longest`: tokens it
        has positions for.
        """
        self.path, self.longest = path, longest
        self._memory = memory
        self._loop: DeviceLoop | None = None
        self._load = load
        self._sessions: DecoderSessions | None = None
        self._bound: weakref.WeakSet[SharedState] = weakref.WeakSet()
        self.many_options = ort.RunOptions()
        self.uncaptured = (
            ort.RunOptions()
        )  # for runs whose addresses differ: without it a GPU's provider would replay the first
        self.uncaptured.add_run_config_entry("gpu_graph_id", "-1")
        if shrink:  # after a step of many tokens its memory goes back to the operating system
            self.many_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    @cached_property
    def verifies(self) -> bool:
        """Whether guessed tokens can be taken back."""
        if (
            self._memory
        ):  # where a step of many tokens takes hardly longer than one, its windows would cross to the host
            return False
        content = self.path.read_bytes()
        return CONV_WINDOW.encode() in content and b"GroupQueryAttention" in content

    @property
    def sessions(self) -> DecoderSessions:
        """Loaded."""
        if self._sessions is None:
            self._sessions = self._load()
            self._probe(self._sessions.decoder)
        return self._sessions

    def release(self) -> None:
        """Give back the graphs' memory. States stay valid, but for those on a device: their buffers are bound to its
        sessions.
        """
        for state in self._bound:
            state.unbind()
        self._sessions = self._loop = None

    def _probe(self, decoder: ort.InferenceSession) -> None:
        self.inputs = {i.name: i for i in decoder.get_inputs()}
        self.states = [
            _state_input(i) for i in decoder.get_inputs() if i.name.startswith(("past_conv.", "past_key_values."))
        ]
        outputs = {o.name: o for o in decoder.get_outputs()}
        if missing := [s.name for s in self.states if present_name(s.name) not in outputs]:
            raise GraphContractError(f"{self.path}: no output carries on {', '.join(missing)}; export the graph again")
        sizes = outputs["logits"].shape[2], self.inputs["inputs_embeds"].shape[2]
        if not all(isinstance(size, int) for size in sizes):
            raise GraphContractError(
                f"{self.path}: vocabulary and hidden size {sizes} are not fixed in the graph; export it again"
            )
        self.vocabulary, self.hidden = sizes
        self.embeds_type = _NUMPY.get(self.inputs["inputs_embeds"].type, np.float32)
        # Sharing needs an operator that writes into its past; its name is in the protobuf or it is not there.
        fp32_edges = self.embeds_type is np.float32 and outputs["logits"].type == "tensor(float)"
        shares = fp32_edges and b"GroupQueryAttention" in self.path.read_bytes() and "position_ids" not in self.inputs
        # How many positions' logits a step gives must be known before it: of ours all of a few tokens, the last of
        # many.
        self.gives_few = outputs["logits"].shape[1] == POSITIONS
        self.shares_kv = shares and (self.gives_few or outputs["logits"].shape[1] == 1)

    def embed(self, ids: list[int]) -> Embeds:
        """Embeddings [1, tokens, H]."""
        (embeds,) = self.sessions.embed.run(
            ["inputs_embeds"], {"input_ids": np.array([ids], np.int64)}, self.uncaptured
        )
        return np.asarray(embeds, np.float32)

    def embed_prompt(self, ids: list[int], features: NDArray[np.float32], image_id: int) -> Embeds:
        """Embeddings [1, tokens, H] with image features [image tokens, H] in the image tokens' places."""
        embeds = self.embed(ids)
        if len(features):
            embeds[0, np.array(ids) == image_id] = features
        return embeds

    def start(self, capacity: int, after: Snapshot | None = None) -> State:
        """State for at most `capacity` tokens, prompt and answer together; fresh, or where a snapshot was taken."""
        self.sessions  # noqa: B018  (loads what tells the shapes)
        if not self.shares_kv:
            return ConcatenatedState(self, capacity, after)
        if self._memory:
            self._loop = self._loop or DeviceLoop(self, self._memory)
            return DeviceState(self._loop, capacity, after)
        state = SharedState(self, capacity, after)
        self._bound.add(state)
        return state


def _state_input(graph_input: Any) -> StateInput:
    if graph_input.type not in _NUMPY:
        raise GraphContractError(
            f"state input {graph_input.name} is {graph_input.type}; float, float16 and int8 are supported"
        )
    shape = list(graph_input.shape)
    shape[0] = 1
    if not graph_input.name.startswith("past_conv."):
        shape[2] = 0
    if not all(isinstance(n, int) for n in shape):
        raise GraphContractError(
            f"state input {graph_input.name} has no fixed shape ({graph_input.shape}); export the graph again"
        )
    return StateInput(graph_input.name, tuple(shape), _NUMPY[graph_input.type])


class SharedState:
    """State in place, through prepared bindings that differ in which convolution buffers are read and which written."""

    def __init__(self, decoder: Decoder, capacity: int, after: Snapshot | None = None) -> None:
        self.length, self.capacity = 0, capacity
        self._decoder = decoder
        self._turn = 0  # which of each convolution's two buffers holds its state
        self._mask = np.ones((1, capacity), np.int64)
        self._logits = np.empty((1, MANY_TOKENS - 1 if decoder.gives_few else 1, decoder.vocabulary), np.float32)
        self._windows: dict[str, NDArray[Any]] = {}  # [1, kernel + tokens, H] of the last `step_all`
        self._window_room: dict[str, NDArray[Any]] = {}
        self._buffers: dict[str, list[NDArray[Any]]] = {}
        for state in decoder.states:
            if state.is_conv:
                self._buffers[state.name] = [np.zeros(state.shape, state.dtype) for _ in range(2)]
            else:
                # Pages of a fresh zero array cost nothing until they are written.
                self._buffers[state.name] = [np.zeros((*state.shape[:2], capacity, state.shape[3]), state.dtype)]
        self._bindings: dict[tuple[int, int, bool], list[ort.IOBinding]] = {}
        if after:
            self.length = after.length
            for name, array in after.values.items():
                target = self._buffers[name][0]
                (target if array.shape == target.shape else target[:, :, : after.length])[...] = array

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """See State."""
        logits: NDArray[np.float32] = self._run(embeds, windows=False)[-1]
        return logits

    def step_token(self, token: int) -> NDArray[np.float32]:
        """See State."""
        return self.step(self._decoder.embed([token]))

    def step_all(self, embeds: Embeds) -> NDArray[np.float32]:
        """As `step` for fewer than MANY_TOKENS tokens, but logits [S, vocabulary] of all; `keep` can then take back the
        last of them.
        """
        return self._run(embeds, windows=True)

    def keep(self, tokens: int) -> None:
        """Be as if the last step, a `step_all`, had fed only its first `tokens`."""
        for name, window in self._windows.items():
            state = self._buffers[name.replace(CONV_WINDOW, "past_conv.")][self._turn]
            state[0] = window[0, tokens : tokens + state.shape[2]].T
            fed = window.shape[1] - state.shape[2]
        self.length += tokens - fed

    def _run(self, embeds: Embeds, *, windows: bool) -> NDArray[np.float32]:
        """Logits [positions, vocabulary]."""
        sessions, tokens = self._decoder.sessions, embeds.shape[1]
        many = tokens >= MANY_TOKENS
        # Guesses are checked by the graph that would have said them.
        reads = sessions.prefill is not None and tokens >= PREFILL_TOKENS and not windows
        session = sessions.prefill if reads and sessions.prefill else sessions.decoder
        positions = 1 if many or not self._decoder.gives_few else tokens
        binding = self._binding(session, positions, windows)[self._turn]
        if windows:
            self._windows = self._room_for_windows(tokens)
        self.length += tokens
        # OrtValues over numpy memory: a view costs microseconds and copies nothing.
        binding.bind_ortvalue_input("inputs_embeds", ort.OrtValue.ortvalue_from_numpy(embeds))
        binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(self._mask[:, : self.length]))
        session.run_with_iobinding(binding, self._decoder.many_options if many else None)
        self._turn = 1 - self._turn
        logits: NDArray[np.float32] = self._logits[0, :positions]
        return logits

    def mark(self) -> Mark:
        """See State."""
        return Mark(
            self.length, {s.name: self._buffers[s.name][self._turn].copy() for s in self._decoder.states if s.is_conv}
        )

    def rewind(self, mark: Mark) -> None:
        """See State."""
        self.length = mark.length
        for name, array in mark.convs.items():
            self._buffers[name][self._turn][...] = array

    def snapshot(self) -> Snapshot:
        """See State."""
        attention = {
            s.name: self._buffers[s.name][0][:, :, : self.length].copy() for s in self._decoder.states if not s.is_conv
        }
        return Snapshot(self.length, {**attention, **self.mark().convs})

    def unbind(self) -> None:
        """Let go of the sessions; the next step binds anew."""
        self._bindings.clear()

    def _binding(self, session: ort.InferenceSession, positions: int, windows: bool) -> list[ort.IOBinding]:
        key = id(session), positions, windows
        if key not in self._bindings:
            self._bindings[key] = _bind(session, self._buffers, self._logits[:, :positions])
            for name, array in (self._room_for_windows(positions) if windows else {}).items():
                value = ort.OrtValue.ortvalue_from_numpy(array)
                for binding in self._bindings[key]:
                    binding.bind_ortvalue_output(name, value)
        return self._bindings[key]

    def _room_for_windows(self, tokens: int) -> dict[str, NDArray[Any]]:
        """[1, kernel + tokens, H] for each convolution: the same memory for any number of tokens."""
        if not self._window_room:
            for s in self._decoder.states:
                if s.is_conv:
                    room = np.empty((1, s.shape[2] + MANY_TOKENS - 1, s.shape[1]), s.dtype)
                    self._window_room[s.name.replace("past_conv.", CONV_WINDOW)] = room
        return {name: room[:, : room.shape[1] - (MANY_TOKENS - 1) + tokens] for name, room in self._window_room.items()}


class BatchState:
    """Several sequences of different lengths in one step: rows of the same buffers, each as long as it is."""

    def __init__(self, decoder: Decoder, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths = [0] * rows  # 0: nobody is there
        self._decoder = decoder
        self._turn = 0
        self._logits = np.empty((rows, 1, decoder.vocabulary), np.float32)
        self._buffers = {
            s.name: [np.zeros((rows, *s.shape[1:]), s.dtype) for _ in range(2)]
            if s.is_conv
            else [np.zeros((rows, s.shape[1], capacity, s.shape[3]), s.dtype)]
            for s in decoder.states
        }
        self._bindings: list[ort.IOBinding] = []

    def put(self, row: int, snapshot: Snapshot) -> None:
        """Continue a sequence here."""
        self.lengths[row] = snapshot.length
        for name, array in snapshot.values.items():
            buffers = self._buffers[name]
            target = buffers[self._turn % len(buffers)][row]
            (target if len(buffers) == 2 else target[:, : snapshot.length])[...] = array[0]

    def leave(self, row: int) -> None:
        """Nobody is there any more."""
        self.lengths[row] = 0

    def moved(self, rows: int, capacity: int) -> BatchState:
        """The sequences that are there, in order, in the first rows of another state."""
        other = BatchState(self._decoder, rows, capacity)
        kept = [row for row, length in enumerate(self.lengths) if length]
        for new, row in enumerate(kept):
            values = {
                name: buffers[self._turn % len(buffers)][row : row + 1] for name, buffers in self._buffers.items()
            }
            length = self.lengths[row]
            other.put(
                new,
                Snapshot(length, {n: v if n.startswith("past_conv.") else v[:, :, :length] for n, v in values.items()}),
            )
        return other

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """Feed one token to every row, embeds [rows, 1, H]; returns logits [rows, vocabulary], valid until the next
        step.
        """
        session = self._decoder.sessions.decoder
        if not self._bindings:
            self._bindings = _bind(session, self._buffers, self._logits)
        binding = self._bindings[self._turn]
        # A row without a sequence writes its first position again and again; nobody reads it.
        mask = (np.arange(max(self.lengths) + 1) <= np.array(self.lengths)[:, None]).astype(np.int64)
        binding.bind_ortvalue_input("inputs_embeds", ort.OrtValue.ortvalue_from_numpy(embeds))
        binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(mask))
        session.run_with_iobinding(binding)
        self._turn = 1 - self._turn
        self.lengths = [n + 1 if n else 0 for n in self.lengths]
        logits: NDArray[np.float32] = self._logits[:, 0]
        return logits


def _bind(
    session: ort.InferenceSession, buffers: Mapping[str, list[NDArray[Any]]], logits: NDArray[np.float32]
) -> list[ort.IOBinding]:
    """Two bindings that differ in which convolution buffers are read and which written; attention's are both. They hold
    on to the arrays' OrtValues.
    """
    bindings = [session.io_binding(), session.io_binding()]
    for binding in bindings:
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
    for name, arrays in buffers.items():
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        for turn, binding in enumerate(bindings):
            binding.bind_ortvalue_input(name, values[turn % len(values)])
            binding.bind_ortvalue_output(present_name(name), values[(turn + 1) % len(values)])
    return bindings


class ConcatenatedState:
    """Past in, present out, through plain session runs."""

    def __init__(self, decoder: Decoder, capacity: int, after: Snapshot | None = None) -> None:
        self.length, self.capacity = (after.length if after else 0), capacity
        self._decoder = decoder
        self._past: dict[str, NDArray[Any]] = {s.name: np.zeros(s.shape, s.dtype) for s in decoder.states}
        self._past |= after.values if after else {}
        self._outputs = ["logits", *(present_name(s.name) for s in decoder.states)]

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """See State."""
        new = embeds.shape[1]
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds.astype(self._decoder.embeds_type, copy=False),
            "attention_mask": np.ones((1, self.length + new), np.int64),
            **self._past,
        }
        if "position_ids" in self._decoder.inputs:
            feeds["position_ids"] = np.arange(self.length, self.length + new, dtype=np.int64)[None]
        logits, *present = self._decoder.sessions.decoder.run(self._outputs, feeds, self._decoder.uncaptured)
        self._past = dict(zip(self._past, present, strict=True))
        self.length += new
        return np.asarray(logits[0, -1], np.float32)

    def step_token(self, token: int) -> NDArray[np.float32]:
        """See State."""
        return self.step(self._decoder.embed([token]))

    def mark(self) -> Mark:
        """See State."""
        return Mark(self.length, {s.name: self._past[s.name] for s in self._decoder.states if s.is_conv})

    def rewind(self, mark: Mark) -> None:
        """See State."""
        attention = {s.name: self._past[s.name][:, :, : mark.length] for s in self._decoder.states if not s.is_conv}
        self._past |= {**attention, **mark.convs}
        self.length = mark.length

    def snapshot(self) -> Snapshot:
        """See State."""
        return Snapshot(self.length, dict(self._past))  # each step makes new arrays: nobody writes into these
