"""What a worker does: load the model of a job once, and answer about batches of images."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnxruntime as ort
import psutil
from distributed import Worker, WorkerPlugin, get_worker
from distributed.utils import sync
from lfm_profiles import Device, now
from lfm_runtime import __version__
from lfm_runtime.errors import EdgeError, ImageError
from lfm_runtime.model import Model
from lfm_runtime.setup.machine import this_machine
from lfm_runtime.setup.profile import default_name
from lfm_serve.asking import settings_hash, settings_of
from lfm_serve.captions.images import Reader, ReadImage, opened, read_image
from lfm_serve.captions.making import Answers
from lfm_serve.captions.setup import plan

from lfm_fleet.bundles import open_bundle
from lfm_fleet.job import Item, Job
from lfm_fleet.places import PlaceError, is_url, read

_MIB = 1 << 20
_loaded: dict[str, Loaded] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Answered:
    """The records of a batch."""

    records: Sequence[dict[str, Any]]
    seconds: float  # the model's loading not counted
    worker: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A worker cannot do a job at all, and why; nothing of the batch is done."""

    address: str
    why: str


class UnfitError(EdgeError):
    """This machine cannot do a job."""


class Loaded(WorkerPlugin):
    """Answers about images with one model, loaded at the first batch; given back when the worker ends."""

    def __init__(self, job: Job) -> None:
        self.job, self.name = job, job.name
        self._answers: Answers | None = None
        self._busy = threading.Lock()
        self.worker: dict[str, Any] = {}

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002  (Dask's signature)
        """Give the model back."""
        _loaded.pop(self.name, None)
        self._answers = None

    def answer(self, items: Sequence[Item]) -> Answered:
        """The record of every image, in the order of completion.

        Raises:
            UnfitError: this machine cannot do the job: no bundle, no memory, another version.
            EdgeError: the model cannot be used any more, or an URL of the bundle cannot be reached now.
        """
        with self._busy:
            answers = self._loading()
            started = time.monotonic()
            reader = Reader(iter(items), lambda item: self._read(answers.model, item))
            try:
                found = [{**record, "worker": self.worker} for _, record in answers.records(reader)]
            finally:
                reader.stop()
            return Answered(found, time.monotonic() - started, self.worker)

    def give_back(self) -> None:
        """Give the model back, unless it answers now."""
        if self._busy.acquire(blocking=False):
            self._answers = None
            self._busy.release()

    def _read(self, model: Model, item: Item) -> ReadImage:
        most = self.job.max_megapixels
        if not is_url(item.path):
            return read_image(model, item.path, item.key, max_megapixels=most)
        image = ReadImage(item.path, item.key, None, item.size, item.modified)
        try:
            content = read(item.path, item.size)
        except ImageError as e:
            return replace(image, error=e)
        except MemoryError:
            return replace(image, error=ImageError("takes more memory than is free"))
        return opened(model, replace(image, size=len(content)), content, max_megapixels=most)

    def _loading(self) -> Answers:
        if self._answers is None:
            try:
                self._answers = self._load()
            except PlaceError:
                raise
            except EdgeError as e:
                raise UnfitError(str(e)) from e
        return self._answers

    def _load(self) -> Answers:
        job = self.job
        flags = {"spinning": False, **job.flags}
        if job.sample and not os.path.exists(job.sample):  # noqa: PTH110  (its name need not be UTF-8)
            raise EdgeError(f"it does not see {job.sample}; name images by a path, or an URL, that all workers see")
        bundle, _ = open_bundle(job.bundle, "", flags, job.manifest)
        how = plan(bundle, default_name(bundle), job.asking, rows=job.rows, device=_device(), **flags)
        settings = settings_hash(settings_of(how.setup, job.asking))
        if settings != job.settings:
            raise EdgeError(
                f"its settings would be others ({how.setup.summary}); install the same lfm-edge there, it has "
                f"{__version__}"
            )
        self.worker = {
            "host": socket.gethostname(),
            "name": _name(),
            "profile": how.setup.profile.name,
            "threads": how.setup.execution.threads,
            "rows": how.rows,
            "lfm_edge": __version__,
            "onnxruntime": ort.__version__,
        }
        model = Model.of(how.setup)
        return Answers(model, job.asking, settings, rows=how.rows, capacity=how.capacity)


def answer(job: Job, items: Sequence[Item]) -> Answered | Refused:
    """A batch, as a task of Dask's."""
    try:
        return loaded(job).answer(items)
    except UnfitError as e:
        return Refused(get_worker().address, " ".join(str(e).split()))


def loaded(job: Job) -> Loaded:
    """What this process has of a job, which Dask's worker, where this is one, keeps as a plugin."""
    with _lock:
        mine = _loaded.setdefault(job.name, Loaded(job))
        others = [other for other in _loaded.values() if other is not mine]
    for other in others:  # of a run that was killed, or of one that is at work beside this one
        other.give_back()
    with contextlib.suppress(ValueError):  # this is no worker
        worker = get_worker()
        if job.name not in worker.plugins:
            sync(worker.loop, worker.plugin_add, plugin=mine, name=job.name)
    return mine


async def release(name: str, dask_worker: Worker) -> None:
    """Give the model of a job back; run on each worker."""
    if name in dask_worker.plugins:
        await dask_worker.plugin_remove(name=name)


def dask_setup(worker: Worker) -> None:  # noqa: ARG001  (Dask's signature, of a module that workers preload)
    """Ctrl-C of a terminal reaches every process; only the one that sends the batches decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _name() -> str:
    try:
        return str(get_worker().name)
    except ValueError:
        return f"process {os.getpid()}"


def _device() -> Device:
    """This machine, with the memory that Dask lets this worker have."""
    device = now(this_machine().device)
    try:
        manager = get_worker().memory_manager
    except ValueError:
        return device
    if not manager.memory_limit:
        return device
    usable = int(manager.memory_limit * (manager.memory_pause_fraction or 1.0)) // _MIB  # there Dask pauses a worker
    left = max(0, usable - psutil.Process().memory_info().rss // _MIB)
    mine = device.limit_mib is None or usable < device.limit_mib
    return replace(
        device,
        limit_mib=usable if mine else device.limit_mib,
        limit_free_mib=left if device.limit_free_mib is None else min(left, device.limit_free_mib),
        limit_by="Dask's memory limit of this worker" if mine else device.limit_by,
    )
