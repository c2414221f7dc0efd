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
from lfm_runtime.errors import EdgeError

from lfm_fleet.crew import RESOURCE, ClusterError, Crew, connected
from lfm_fleet.places import why

_RETRIES, _LOOK_S, _COME_S = 2, 1.0, 30.0


class Workers:
    """Those of a scheduler that take part. A result stays with its worker until it is asked for. Where the worker dies,
    Dask makes it again of the calls before it, unless one of them took a shared value that nobody holds any more.
    """

    def __init__(self, scheduler: str, client: Client, crew: Crew) -> None:
        self._scheduler, self._client, self._crew = scheduler, client, crew
        self.size = len(crew.look())

    def call(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call a function, which the workers can import, with values or with futures of other calls."""
        return self._client.submit(function, *args, resources={RESOURCE: 1}, retries=_RETRIES, pure=False)

    def share(self, value: Any) -> Future[Any]:
        """Bring a value to every worker, not through the scheduler.

        Raises:
            ClusterError: the workers cannot be reached from here.
        """
        with _as_ours(self._scheduler):
            shared: list[Future[Any]] = self._client.scatter([value], broadcast=True, direct=True, hash=False)
        return shared[0]

    def results(self, calls: Sequence[Future[Any]]) -> Iterator[Any]:
        """What calls return, in their order.

        Raises:
            ClusterError: there is no worker any more, or one that cannot do it.
            EdgeError: as the function.
        """
        with _as_ours(self._scheduler):
            for call in calls:
                self._wait(call)
                yield self._client.gather(call, direct=True)

    def _wait(self, call: Future[Any]) -> None:
        """Until it is done, while there is a worker, or one may come."""
        seen, done = time.monotonic(), Event()
        call.add_done_callback(lambda _: done.set())
        while not done.wait(_LOOK_S):
            seen = time.monotonic() if self._crew.look() else seen
            if time.monotonic() - seen > _COME_S:
                self._crew.check()


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


@contextmanager
def _as_ours(scheduler: str) -> Iterator[None]:
    try:
        yield
    except EdgeError:
        raise
    except CancelledError as e:
        raise ClusterError(f"a worker of {scheduler} left, and what it held is lost; run again") from e
    except Exception as e:
        raise ClusterError(f"the workers of {scheduler} cannot do it ({why(e)}); run again") from e
