"""What a decoder remembers of the tokens it has processed: its interface, marks to go back to, copies to start others
from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lfm_runtime.decode.sampling import Top
from lfm_runtime.formats.contract import is_conv

Embeds = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Mark:
    """A point to go back to within one state: attention's past is cut there, convolutions are given what they held."""

    length: int
    convs: Arrays


@dataclass(frozen=True)
class Snapshot:
    """All that is remembered of `length` tokens, by state input: convolutions [1, H, kernel], attention [1, kv heads,
    length, D].
    """

    length: int
    values: Arrays

    def copy(self) -> Snapshot:
        """The same in arrays of its own."""
        return Snapshot(self.length, {name: array.copy() for name, array in self.values.items()})


class State(Protocol):
    """What a decoder remembers of the tokens processed so far."""

    length: int
    capacity: int

    def step(self, embeds: Embeds) -> NDArray[np.float32]:
        """Feed embeds [1, S, H]; returns the logits [vocabulary] of the last position, valid until the next step."""
        ...

    def step_token(self, token: int) -> NDArray[np.float32] | Top:
        """Feed one token; as `step`, or only the top of the logits where they lie on a device."""
        ...

    def mark(self) -> Mark:
        """Where the state is now. Small: attention's past stays where it is."""
        ...

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark of this state."""
        ...

    def snapshot(self) -> Snapshot:
        """What other states can start from. Its arrays may be this state's own: whoever keeps them beyond the next step
        copies them.
        """
        ...


class Starter(Protocol):
    """Where sequences begin: a decoder, or a row of a batch."""

    @property
    def longest(self) -> int:
        """Tokens that a state may have room for."""
        ...

    def start(self, capacity: int, after: Snapshot | None = None) -> State:
        """State for at most `capacity` tokens, prompt and answer together; fresh, or where a snapshot was taken."""
        ...


@dataclass(frozen=True)
class StateInput:
    """One state input of the decoder, as probed from the graph."""

    name: str
    shape: tuple[int, ...]  # with 0 where the past length goes
    dtype: Any

    @property
    def is_conv(self) -> bool:
        """Whether the state is a convolution's; else it is an attention layer's."""
        return is_conv(self.name)
