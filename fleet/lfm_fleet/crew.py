"""The workers of a Dask cluster: reaching them, and which of them take part."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnxruntime as ort
from distributed import Client, LocalCluster
from distributed.comm.addressing import get_address_host_port, parse_address
from distributed.comm.core import connect
from distributed.comm.registry import get_backend
from distributed.security import Security
from lfm_profiles import default_threads, now
from lfm_runtime import __version__
from lfm_runtime.errors import EdgeError, SettingError
from lfm_runtime.setup.machine import this_machine

from lfm_fleet.places import why

RESOURCE = "lfm-edge"
"""What a worker offers that may be asked: one a process, so that it does one batch at a time."""
START = 'dask worker ADDRESS --nthreads 1 --resources "lfm-edge=1"'
_CONNECT_S = 5.0
RETURN_S = 120.0
"""How long a scheduler that is gone, or a worker where there is none, is waited for."""
_LOOK_S = 1.0
_COME_S = 10.0
"""How long a run waits for its first worker …"""
_OFFER_S = 3.0
"""… and, where there are workers, for one that takes part."""


GONE = (OSError, TimeoutError, asyncio.TimeoutError, CancelledError)
"""What Dask raises where a scheduler or a worker has left or does not answer; of TimeoutErrors there were two once."""


class ClusterError(EdgeError):
    """The cluster cannot be used, or not any more: the message says why, and what to do."""


class Crew:
    """The workers that offer to be asked. One that cannot do a job is told of once, and gets no more batches."""

    def __init__(self, client: Client, warn: Callable[[str], None]) -> None:
        self.client, self._warn = client, warn
        self._known: set[str] = set()  # addresses that were asked who they are
        self._refused: dict[str, str] = {}  # address → why
        self._unlike: set[str] = set()  # lines that were said
        self._there: dict[str, float] = {}  # address → what it offers
        self._looked = 0.0

    def gather(self) -> None:
        """Wait for the first worker that takes part, which is asked who it is.

        Raises:
            ClusterError: there is none.
        """
        started = time.monotonic()
        while not self.look() and not self._refused:
            if time.monotonic() - started > (_OFFER_S if self._there else _COME_S):
                break
            time.sleep(0.2)
        self.check()

    def look(self) -> list[str]:
        """Addresses of the workers that take part, looked up once a second; new ones are asked who they are."""
        if time.monotonic() - self._looked > _LOOK_S and is_reached(self.client):
            with suppress(*GONE):  # which its tasks tell, too
                offers = self._offers()
                if new := [address for address in offers if address not in self._known]:
                    self._ask(new, offers)
                self._there = offers
            self._looked = time.monotonic()
        return [address for address, offer in self._there.items() if offer and address not in self._refused]

    def all_refuse(self) -> bool:
        """Whether workers are there that offer to be asked, and every one of them has refused."""
        offering = [address for address, offer in self._there.items() if offer]
        return bool(offering) and all(address in self._refused for address in offering)

    def check(self) -> None:
        """Raise ClusterError where every worker that offered to be asked has refused, or none offers."""
        if self.look():
            return
        if self._refused:
            lines = "; ".join(sorted(set(self._refused.values())))
            raise ClusterError(f"no worker can do this: {lines}. What is written stays; mend it, and run again")
        if count := len(self._there):
            raise ClusterError(f"none of the {count} workers offers {RESOURCE}; start some so: {START}")
        raise ClusterError(f"the scheduler has no workers; start some so: {START}")

    def refuse(self, address: str, reason: str) -> None:
        """Send no more batches to a worker."""
        if address not in self._refused:
            self._refused[address] = reason
            self._warn(f"worker {address} gets nothing to do: {reason}")

    def met(self, worker: dict[str, Any]) -> None:
        """Say once where a worker's versions are not the ones here."""
        here = {"onnxruntime": ort.__version__, "lfm_edge": __version__}
        for name, mine in here.items():
            line = f"{worker['host']} has {name.replace('_', '-')} {worker[name]}, here {mine} is installed"
            if worker[name] != mine and line not in self._unlike:
                self._unlike.add(line)
                self._warn(f"{line}: answers may differ in rare cases")

    def review(self) -> bool:
        """Ask everybody again, since tasks fail; whether somebody gets nothing more to do for it."""
        before = len(self._refused)
        self._known.clear()
        self._looked = 0.0
        self.look()
        return len(self._refused) > before

    def forget(self) -> None:
        """After the scheduler was started again: everybody is new."""
        self._known.clear()
        self._refused.clear()
        self._there.clear()
        self._looked = 0.0

    def _offers(self) -> dict[str, float]:
        workers = self.client.scheduler_info(n_workers=-1)["workers"]
        return {address: worker.get("resources", {}).get(RESOURCE, 0) for address, worker in workers.items()}

    def _ask(self, addresses: list[str], offers: Mapping[str, float]) -> None:
        """Whether workers have this package. Those that offer nothing are somebody else's."""
        mine = [address for address in addresses if offers.get(address)]
        self._known.update(addresses)
        for address, answer in self.client.run(who, workers=mine, on_error="return").items() if mine else ():
            if isinstance(answer, GONE):  # asked again
                self._known.discard(address)
            elif isinstance(answer, BaseException):
                self.refuse(address, _unasked(answer))


def who() -> str:
    """The version of this package, where a worker has it."""
    return __version__


def _unasked(e: BaseException) -> str:
    if isinstance(e, ImportError) or "No module named" in str(e):
        return f"its Python lacks lfm-edge with the extra fleet ({why(e)}); install the same there as here"
    return why(e)


# -------------------------------------------------------------------------------------------------- reaching a cluster


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of a scheduler that runs; TLS as Dask's configuration says.

    Raises:
        ClusterError: it cannot be reached, or has another TLS.
    """
    try:
        get_backend(parse_address(address, strict=True)[0])
        get_address_host_port(address, strict=True)
    except ValueError as e:
        raise ClusterError(
            f"--scheduler {address} is no address ({why(e)}); one is tcp://host:8786 or tls://host:8786"
        ) from e
    with _quiet():
        try:
            asyncio.run(_reach(address))  # a Client that could not connect says more, and later
            client = Client(address, timeout=RETURN_S, set_as_default=False)
        except Exception as e:
            raise ClusterError(_unreached(address, e)) from e
        try:
            try:
                client.run_on_scheduler(version, "lfm-edge")
            except PackageNotFoundError as e:
                raise ClusterError(
                    f"the Python of the scheduler {address} lacks lfm-edge, which reads what is sent to workers; "
                    "install there what the workers have"
                ) from e
            except OSError as e:
                raise ClusterError(_unreached(address, e)) from e
            yield client
        finally:
            with suppress(Exception):
                client.close(timeout=2)


@contextmanager
def local(workers: int) -> Iterator[Client]:
    """A cluster of processes on this machine, each with its share of the processors and of the free memory.

    Raises:
        ClusterError: the processes cannot be started.
    """
    free = now(this_machine().device).free_mib
    limit = "auto" if free is None else int(free / workers) << 20
    with _quiet():
        try:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=limit,
                resources={RESOURCE: 1},
                dashboard_address="127.0.0.1:0",  # its port may be taken
                silence_logs=logging.CRITICAL,
                preload=["lfm_fleet.worker"],
            )
        except Exception as e:
            raise ClusterError(f"{workers} worker processes cannot be started ({why(e)}); ask for fewer") from e
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


async def _reach(address: str) -> None:
    comm = await connect(address, timeout=_CONNECT_S, **Security().get_connection_args("client"))
    await comm.close()


def check_workers(workers: int) -> None:
    """Raise SettingError for more processes on this machine than it has processors."""
    if workers > (os.cpu_count() or workers):
        raise SettingError(f"--workers {workers}: this machine has {os.cpu_count()} processors; ask for fewer")


def threads_each(workers: int) -> int:
    """Threads of each of `workers` processes on this machine."""
    return max(1, default_threads() // workers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask's own lines about workers that come and go are for its dashboard; errors are told by ours."""
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _unreached(address: str, e: BaseException) -> str:
    deepest = e
    while deepest.__cause__ or deepest.__context__:
        deepest = deepest.__cause__ or deepest.__context__  # type: ignore[assignment]
    said = f"{why(e)} {why(deepest)}"
    missing = isinstance(deepest, FileNotFoundError) and address.startswith("tls")
    if missing or "ssl" in said.lower() or "tls" in said.lower() or "certificate" in said.lower():
        return (
            f"the scheduler {address} was not reached by TLS ({why(deepest)}); check distributed.comm.tls in Dask's "
            "configuration: the CA, certificate and key must be of the cluster (docs/fleet.md)"
        )
    because = "it does not answer" if isinstance(deepest, (CancelledError, asyncio.CancelledError)) else why(deepest)
    return f"the scheduler {address} cannot be reached ({because}); start one with: dask scheduler"


def is_reached(client: Client) -> bool:
    """Whether a client has its scheduler now."""
    return client.status == "running" and client.scheduler_comm is not None and not client.scheduler_comm.comm.closed()
