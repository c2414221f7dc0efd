"""Any function over parts of a work, on the workers of a cluster; results in the order of the parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lfm_runtime.errors import EdgeError

from lfm_fleet.crew import RESOURCE, ClusterError, Crew, connected
from lfm_fleet.places import why

Part = TypeVar("Part")
Result = TypeVar("Result")
_RETRIES = 2


def spread(scheduler: str, function: Callable[[Part], Result], parts: Sequence[Part]) -> Iterator[Result]:
    """Results of `function`, which the workers can import, one after the other; each part is a task.

    Raises:
        ClusterError: the cluster cannot be reached, or has no worker that takes part, or is gone.
        EdgeError: as the function.
    """

    def warn(line: str) -> None:
        print(f"lfm-edge: {line}", file=sys.stderr, flush=True)

    with connected(scheduler) as client:
        Crew(client, warn).gather()
        futures = [
            client.submit(function, part, resources={RESOURCE: 1}, retries=_RETRIES, pure=False) for part in parts
        ]
        try:
            for future in futures:
                yield future.result()
        except EdgeError:
            raise
        except Exception as e:
            raise ClusterError(f"the workers of {scheduler} cannot do it ({why(e)}); run again") from e
