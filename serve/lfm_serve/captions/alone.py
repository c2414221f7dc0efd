"""Answers that are made in this process: where its images and records lie, and how the model runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import bundle_of, setting_flags
from lfm_runtime.errors import SettingError
from lfm_runtime.model import Model
from lfm_runtime.setup.setup import Setup

from lfm_serve.asking import Asking
from lfm_serve.captions.images import Reader, find, is_unchanged, read_image
from lfm_serve.captions.journal import Journal
from lfm_serve.captions.making import Answers
from lfm_serve.captions.output import Known, Output
from lfm_serve.captions.setup import Plan, plan


class Maker(Protocol):
    """Where answers are made: in this process, or elsewhere (lfm_fleet)."""

    def bundle(self) -> Bundle:
        """The bundle, opened here."""

    def plan(self, bundle: Bundle, asking: Asking) -> Setup:
        """How answers will be made, before anything is loaded."""

    def find(self, warn: Callable[[str], None]) -> Iterable[str]:
        """Paths of images that are there."""

    def output(self, settings: Mapping[str, Any], digest: str) -> AbstractContextManager[Output]:
        """Where records go, opened; `digest` is the settings' hash."""

    def is_unchanged(self, path: str, record: Known) -> bool:
        """Whether an image is as its record says."""

    def records(
        self, paths: Iterable[str], asking: Asking, output: Output, warn: Callable[[str], None]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Answer about every path; each with its record, in the order of completion. Raises EdgeError where the model
        cannot be used.
        """

    def stop(self) -> None:
        """Begin no more answers; those that are being made come yet. May be called by a signal's handler."""


class Alone:
    """This process makes the answers, and reads and writes files."""

    def __init__(self, options: argparse.Namespace) -> None:
        """`options`: of `lfm-edge caption`."""
        self._options = options
        self._plan: Plan | None = None
        self._reader: Reader[str] | None = None
        self._stopped = False

    def bundle(self) -> Bundle:
        """See Maker; an id of the hub is fetched."""
        return Bundle.open(Path(bundle_of(self._options)))

    def plan(self, bundle: Bundle, asking: Asking) -> Setup:
        """See Maker; says what was given up to fit the memory."""
        options = self._options
        flags = {**setting_flags(options), "max_new_tokens": options.max_new_tokens}
        self._plan = plan(bundle, options.profile, asking, rows=options.rows, **flags)
        setup = self._plan.setup
        for line in setup.reductions:
            print(f"lfm-edge: {line}", file=sys.stderr)
        return setup

    def find(self, warn: Callable[[str], None]) -> Iterable[str]:
        """See Maker."""
        options = self._options
        return find(options.places, recursive=options.recursive, match=options.match, warn=warn)

    def output(self, settings: Mapping[str, Any], digest: str) -> AbstractContextManager[Journal]:
        """See Maker."""
        return Journal.open(Path(self._options.output), settings, digest, remembers=self._options.watch)

    def is_unchanged(self, path: str, record: Known) -> bool:
        """See Maker."""
        return is_unchanged(path, record)

    def records(
        self,
        paths: Iterable[str],
        asking: Asking,
        output: Output,
        warn: Callable[[str], None],  # noqa: ARG002  (nothing here leaves or comes)
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """See Maker; images are read a few ahead."""
        assert self._plan
        how, most = self._plan, self._options.max_megapixels
        model = Model.of(how.setup)
        answers = Answers(model, asking, output.settings, rows=how.rows, capacity=how.capacity)
        if (self._options.rows or 1) > answers.rows:
            raise SettingError(
                f"--rows {self._options.rows} has no effect: the decoder of {model.bundle.folder} makes one answer at "
                "a time (from --portable, or another exporter); leave it out"
            )
        if not self._options.quiet:
            print(f"{how.setup.summary}, {answers.rows} at once", file=sys.stderr)
        self._reader = Reader(paths, lambda path: read_image(model, path, output.key(path), max_megapixels=most))
        if self._stopped:  # before there was a reader to be stopped
            self._reader.stop()
        return ((image.path, record) for image, record in answers.records(self._reader))

    def stop(self) -> None:
        """See Maker."""
        self._stopped = True
        if self._reader:
            self._reader.stop()
