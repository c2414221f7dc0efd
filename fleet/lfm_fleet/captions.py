"""`lfm-edge caption` on a cluster: where its images and records lie, and who answers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import setting_flags
from lfm_runtime.setup.resolve import resolve
from lfm_runtime.setup.setup import Setup
from lfm_serve.asking import Asking
from lfm_serve.captions.images import find, is_unchanged
from lfm_serve.captions.journal import Journal
from lfm_serve.captions.output import Known, Output

from lfm_fleet import places
from lfm_fleet.batches import Batches
from lfm_fleet.bundles import as_sent, open_bundle
from lfm_fleet.crew import check_workers, connected, local, threads_each
from lfm_fleet.job import Item, Job, decided
from lfm_fleet.parts import Parts


class Cluster:
    """Dask's workers make the answers; what answers depend on is decided here, how they are computed by each worker."""

    def __init__(self, options: argparse.Namespace) -> None:
        """`options`: of `lfm-edge caption`."""
        self._options = options
        self._flags = {**setting_flags(options), "max_new_tokens": options.max_new_tokens}
        if options.workers:
            check_workers(options.workers)
        if options.workers and options.threads is None:
            self._flags["threads"] = threads_each(options.workers)
        self._manifest = ""
        self._setup: Setup | None = None
        self._listed: dict[str, places.FoundImage] = {}
        self._batches: Batches | None = None
        self._stopped = False

    def bundle(self) -> Bundle:
        """See Maker; of an URL it is fetched into this machine's cache, too."""
        bundle, self._manifest = open_bundle(self._options.bundle, self._options.profile, self._flags)
        return bundle

    def plan(self, bundle: Bundle, asking: Asking) -> Setup:  # noqa: ARG002  (memory is each worker's)
        """See Maker."""
        self._setup = resolve(bundle, self._options.profile, force=True, **self._flags)
        return self._setup

    def find(self, warn: Callable[[str], None]) -> Iterable[str]:
        """See Maker; URLs too."""
        options = self._options
        kind = {"recursive": options.recursive, "match": options.match, "warn": warn}
        for place in options.places:
            if not places.is_url(place):
                yield from find([place], **kind)
                continue
            for image in places.find(place, **kind):
                self._listed[image.url] = image
                yield image.url

    def output(self, settings: Mapping[str, Any], digest: str) -> AbstractContextManager[Output]:
        """See Maker: a file, or parts at an URL."""
        place = self._options.output
        if places.is_url(place):
            return Parts.open(place, settings, digest)
        return Journal.open(Path(place), settings, digest)

    def is_unchanged(self, path: str, record: Known) -> bool:
        """See Maker; of an URL as it was listed."""
        if (image := self._listed.get(path)) is None:
            return is_unchanged(path, record)
        return image.modified == record.modified and image.size in (None, record.size)

    def records(
        self, paths: Iterable[str], asking: Asking, output: Output, warn: Callable[[str], None]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """See Maker."""
        options, setup = self._options, self._setup
        assert setup
        items = [self._item(path, output.key(path)) for path in paths]
        job = Job(
            as_sent(options.bundle),
            self._manifest,
            {**self._flags, **decided(setup)},
            asking,
            output.settings,
            options.rows,
            options.max_megapixels,
            next((i.path for i in items if not places.is_url(i.path) and os.path.exists(i.path)), ""),  # noqa: PTH110
        )
        where = f"worker processes: {options.workers}" if options.workers else options.scheduler
        if not options.quiet:
            prefill = f", prefill {setup.prefill}" if setup.prefill else ""
            print(f"{setup.variant}{prefill}, settings of profile {setup.profile.name}; {where}", file=sys.stderr)
        with local(options.workers) if options.workers else connected(options.scheduler) as client:
            self._batches = Batches(client, job, items, warn)
            if self._stopped:
                self._batches.stop()
            for item, record in self._batches.records():
                yield item.path, record

    def stop(self) -> None:
        """See Maker."""
        self._stopped = True
        if self._batches:
            self._batches.stop()

    def _item(self, path: str, key: str) -> Item:
        if image := self._listed.get(path):
            return Item(path, key, image.size, image.modified)
        return Item(os.path.abspath(path), key)  # noqa: PTH100  (links stay)
