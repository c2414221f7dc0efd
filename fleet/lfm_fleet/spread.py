"""Any function over parts of a work, on the workers of a cluster; results in the order of the parts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from distributed import Future
from lfm_runtime.errors import EdgeError

from lfm_fleet.crew import RESOURCE, ClusterError, Crew, connected
from lfm_fleet.places import why

Part = TypeVar("Part")
Result = TypeVar("Result")
_RETRIES, _STEP_S, _COME_S = 2, 0.05, 30.0


def spread(scheduler: str, function: Callable[[Part], Result], parts: Sequence[Part]) -> Iterator[Result]:
    """Results of `function`, which the workers can import, one after the other; each part is a task.

    Raises:
        ClusterError: the cluster cannot be reached, or has no worker that takes part, or is gone.
        EdgeError: as the function.
    """

    def warn(line: str) -> None:
        print(f"lfm-edge: {line}", file=sys.stderr, flush=True)

    with connected(scheduler) as client:
        crew = Crew(client, warn)
        crew.gather()
        futures = [
            client.submit(function, part, resources={RESOURCE: 1}, retries=_RETRIES, pure=False) for part in parts
        ]
        try:
            for future in futures:
                yield _result(future, crew)
        except EdgeError:
            raise
        except Exception as e:
            raise ClusterError(f"the workers of {scheduler} cannot do it ({why(e)}); run again") from e


def _result(future: Future[Any], crew: Crew) -> Any:
    """Of a task, while there is a worker, or one may come."""
    seen = time.monotonic()
    while future.status == "pending":
        time.sleep(_STEP_S)
        seen = time.monotonic() if crew.look() else seen
        if time.monotonic() - seen > _COME_S:
            crew.check()
    return future.result()
