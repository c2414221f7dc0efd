"""Functions called on the workers of a cluster, for quantizing and judging."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from threading import Event
from typing import Any

from distributed import Client, Future
from lfm_runtime.errors import EdgeError, is_out_of_memory

from lfm_fleet.crew import RESOURCE, ClusterError, Crew, connected, is_reached
from lfm_fleet.places import why

_RETRIES, _LOOK_S, _COME_S = 2, 1.0, 30.0
_ENDED = ("finished", "error", "cancelled")


class Workers:
    """Those of a scheduler that take part. A result stays with its worker until it is asked for. Where the worker dies,
    Dask makes it again of the calls before it, unless one of them took a shared value that nobody holds any more.
    """

    def __init__(self, scheduler: str, client: Client, crew: Crew) -> None:
        self._scheduler, self._client, self._crew = scheduler, client, crew

    @property
    def size(self) -> int:
        """How many take part now."""
        return max(1, len(self._crew.look()))

    def call(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call a function, which the workers can import, with values or with futures of other calls.

        Raises:
            ClusterError: the scheduler is gone.
        """
        with self._failures_are_ours():
            return self._client.submit(function, *args, resources={RESOURCE: 1}, retries=_RETRIES, pure=False)

    def share(self, value: Any) -> Future[Any]:
        """Bring a value to every worker that takes part, not through the scheduler.

        Raises:
            ClusterError: a worker cannot be reached from here.
        """
        with self._failures_are_ours():
            (shared,) = self._client.scatter(
                [value], workers=self._crew.look(), broadcast=True, direct=True, hash=False
            )
            return shared  # type: ignore[no-any-return]  # distributed has few types

    def results(self, calls: Sequence[Future[Any]], *, large: bool = False) -> Iterator[Any]:
        """What calls return, in their order; what is large comes from the workers, not through the scheduler.

        Raises:
            ClusterError: there is no worker any more, or one that cannot do it.
            EdgeError: as the function.
        """
        with self._failures_are_ours():
            for call in calls:
                self._wait(call)
                if call.status == "error":
                    raise self._failure(call.exception())
                yield self._client.gather(call, direct=large)

    def _wait(self, call: Future[Any]) -> None:
        """Until it is done, while there is a worker, or one may come."""
        seen, done = time.monotonic(), Event()
        call.add_done_callback(lambda _: done.set())
        while call.status not in _ENDED:
            if done.wait(_LOOK_S):
                done.clear()  # what was done may be lost before it is fetched
                continue
            seen = time.monotonic() if self._crew.look() else seen
            if time.monotonic() - seen > _COME_S:
                self._crew.check()

    def _failure(self, e: BaseException) -> EdgeError:
        """What a function raised on a worker."""
        if isinstance(e, EdgeError):
            return e
        if is_out_of_memory(e):
            do = "start workers with more, or fewer on a machine, and run again"
            return ClusterError(f"a worker of {self._scheduler} has not enough memory for it; {do}")
        return ClusterError(f"the workers of {self._scheduler} cannot do it ({why(e)}); run again")

    @contextmanager
    def _failures_are_ours(self) -> Iterator[None]:
        """What Dask raises becomes a ClusterError. It has no common error for what its connections meet."""
        try:
            yield
        except (EdgeError, MemoryError):  # MemoryError: this process's own
            raise
        except Exception as e:
            if not is_reached(self._client):
                said = f"the scheduler {self._scheduler} is gone"
            elif isinstance(e, CancelledError):
                said = f"a worker of {self._scheduler} left, and what it held is lost"
            else:
                said = f"a worker of {self._scheduler} left, or cannot be reached from here"
            raise ClusterError(f"{said} ({why(e)}); run again") from e


@contextmanager
def workers(scheduler: str) -> Iterator[Workers]:
    """The workers of a scheduler.

    Raises:
        ClusterError: the cluster cannot be reached, or has no worker that takes part.
    """

    def warn(line: str) -> None:
        print(f"lfm-edge: {line}", file=sys.stderr, flush=True)

    with connected(scheduler) as client:
        crew = Crew(client, warn)
        crew.gather()
        yield Workers(scheduler, client, crew)
