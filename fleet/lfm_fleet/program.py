"""For programs that use Dask themselves: records of images from a client, a bag or a column of a dataframe."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client
from lfm_runtime.setup.resolve import resolve
from lfm_serve.asking import Asking, settings_hash, settings_of

from lfm_fleet.batches import Batches
from lfm_fleet.bundles import as_sent, open_bundle
from lfm_fleet.job import Item, Job, decided
from lfm_fleet.worker import loaded

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioner:
    """A question to one model about any images. It can be sent to workers: each loads the model once."""

    job: Job

    def __call__(self, images: Iterable[str]) -> list[dict[str, Any]]:
        """The records of images, paths or URLs, in their order: here, or in the worker whose task this is.

        Raises:
            EdgeError: the model cannot be used here. An error of one image is its record's `error`.
        """
        paths = [os.fspath(image) for image in images]
        items = [Item(path, str(n)) for n, path in enumerate(paths)]
        found = {int(record["path"]): record for record in loaded(self.job).answer(items).records}
        return [{**found[n], "path": path} for n, path in enumerate(paths)]


def captioner(
    bundle: str | os.PathLike[str],
    question: str,
    *,
    system: str = "",
    schema: str | None = None,
    choices: Sequence[str] = (),
    profile: str = "",
    rows: int | None = None,
    max_megapixels: float = 100.0,
    generation: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Captioner:
    """What is asked, and what answers depend on, decided here: the variant and the image settings of `profile`, by
    default of this machine's, and `flags`. A worker computes it as its own profile says.

    Args:
        bundle: a path that is the same on all workers, or an URL.
        question: about each image.
        system: system prompt.
        schema: a JSON schema that answers follow.
        choices: the likeliest of these is the answer.
        profile: a name or a TOML file.
        rows: answers at once in each worker; by default as its memory allows.
        max_megapixels: larger images are errors.
        generation: temperature, seed, repetition_penalty; greedy by default.
        **flags: settings of a profile: variant, threads, max_image_tokens, max_new_tokens …

    Raises:
        BundleError, SettingError: as `lfm_runtime.resolve`.
    """
    opened, manifest = open_bundle(os.fspath(bundle), profile, flags)
    setup = resolve(opened, profile, force=True, **flags)
    how = {} if choices else {"temperature": 0.0, **(generation or {})}
    asking = Asking(question, system, schema, tuple(choices), generation=how)
    return Captioner(
        Job(
            as_sent(os.fspath(bundle)),
            manifest,
            {**flags, **decided(setup)},
            asking,
            settings_hash(settings_of(setup, asking)),
            rows,
            max_megapixels,
        )
    )


def caption(
    client: Client, images: Iterable[str | os.PathLike[str]], bundle: str | os.PathLike[str], question: str, **how: Any
) -> Iterator[dict[str, Any]]:
    """Ask the same about images on the workers of `client` that offer the resource lfm-edge; yield records in the order
    of completion, one for each different path or URL. `how`: as of `captioner`.

    Raises:
        BundleError, SettingError: as `captioner`.
        ClusterError: no worker can do it, or the scheduler is gone and does not come back.
    """
    items = [Item(path, path) for path in dict.fromkeys(os.fspath(image) for image in images)]
    job = captioner(bundle, question, **how).job
    for _, record in Batches(client, job, items, lambda line: _log.warning("lfm-edge: %s", line)).records():
        yield record
