"""Ids of the Hugging Face hub: owner/name, or owner/name@revision. What is needed of a repository is fetched by the
hub's own client into its own cache, and is a folder from then on.

Nothing is fetched but for an id that the user typed and that is no path here. The client's environment variables hold:
HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lfm_profiles import Profile

from lfm_runtime.bundle import find_variants
from lfm_runtime.errors import EdgeError, command
from lfm_runtime.formats.contract import DECODER
from lfm_runtime.formats.manifest import MANIFEST, Manifest, recipe_file
from lfm_runtime.formats.onnx_file import external_files
from lfm_runtime.installation import install_advice
from lfm_runtime.setup.variants import choose_variants

SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "LICENSE",
)
"""What a checkpoint and a bundle have beside weights."""
_CHECKPOINT = (*SETTINGS_FILES, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md")
_BUNDLE = (*SETTINGS_FILES, MANIFEST, "prompt.json", "profile.toml", "golden/*")


class HubError(EdgeError, OSError):
    """A repository of the hub cannot be had: the message says why, and what to do."""


@dataclass(frozen=True)
class HubId:
    """A repository, and the branch, tag or commit that is wanted of it; None is the main branch."""

    name: str  # owner/name
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @staticmethod
    def parse(text: str | os.PathLike[str]) -> HubId | None:
        """An id as the user writes it; None for what is, or looks like, a path. Raises HubError without a revision
        behind an @.
        """
        found = re.fullmatch(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@(?P<revision>[\w./-]*))?", os.fspath(text))
        if not found or Path(text).exists() or Path(found["name"]).parent.exists():
            return None
        if found["revision"] == "":
            raise HubError(f"{text} names no revision behind @; name a branch, a tag or a commit, or leave the @ out")
        return HubId(found["name"], found["revision"])

    @staticmethod
    def of_cache(folder: Path) -> HubId | None:
        """The repository and the commit of a snapshot in the hub's cache; None for any other folder."""
        snapshot = folder.resolve()
        found = re.fullmatch(r"models--(.+)", snapshot.parents[1].name) if len(snapshot.parents) > 1 else None
        if not found or snapshot.parent.name != "snapshots":
            return None
        return HubId(found[1].replace("--", "/", 1), snapshot.name)


def checkpoint_folder(text: str | os.PathLike[str], *, quiet: bool = False) -> Path:
    """The folder of a checkpoint, fetched where `text` is an id of the hub. Raises HubError."""
    return _folder(text, _CHECKPOINT, quiet=quiet)


def adapter_folder(text: str | os.PathLike[str], *, quiet: bool = False) -> Path:
    """The folder of a LoRA adapter, fetched where `text` is an id of the hub. Raises HubError."""
    return _folder(text, _ADAPTER, quiet=quiet)


def bundle_folder(text: str | os.PathLike[str], profile: Profile, *, quiet: bool = False) -> Path:
    """The folder of a bundle or of a hub repository's ONNX files, fetched where `text` is an id of the hub: of its
    graphs those alone that the profile comes to.

    Raises:
        HubError: it cannot be had, or has no graphs that can be run.
        SettingError: a flag of the profile's cannot hold with its variants.
    """
    wanted = HubId.parse(text)
    if wanted is None:
        return Path(text)
    repository = _Repository(wanted, quiet=quiet)
    if not repository.files:
        return repository.cached()
    folder = repository.fetch(_BUNDLE)
    manifest = Manifest.read(folder)
    variants = manifest.variants if manifest else find_variants(repository.files)
    if not variants:
        raise HubError(
            f"{wanted} has no ONNX graphs that lfm-edge runs; if it is a checkpoint: "
            f"{command('export', wanted, '-o', 'bundle')}"
        )
    variant, prefill = choose_variants(variants, profile)
    if variant not in variants:
        raise HubError(f"{wanted} has no variant {variant!r}; it has {', '.join(variants)}")
    recipes = [recipe_file(name) for name in (variant, prefill) if name]
    graphs = {*variants[variant].values(), *([variants[prefill][DECODER.stem]] if prefill else [])}
    repository.fetch([*recipes, *(name for graph in graphs for name in (graph, f"{glob.escape(graph)}[_.]data*"))])
    data = [str(PurePosixPath(graph).parent / name) for graph in graphs for name in external_files(folder / graph)]
    missing = [name for name in data if not (folder / name).exists()]
    return repository.fetch(missing) if missing else folder


def _folder(text: str | os.PathLike[str], patterns: Sequence[str], *, quiet: bool) -> Path:
    wanted = HubId.parse(text)
    if wanted is None:
        return Path(text)
    repository = _Repository(wanted, quiet=quiet)
    return repository.fetch(patterns) if repository.files else repository.cached()


class _Repository:
    """One repository, through huggingface_hub."""

    def __init__(self, wanted: HubId, *, quiet: bool) -> None:
        """Ask for the names of its files; there are none where the hub cannot be asked and something is cached."""
        self.id = wanted
        self._hub = _client(wanted)
        if quiet:
            self._hub.utils.disable_progress_bars()
        self.files: list[str] = []
        with self._errors():
            try:
                found = self._hub.HfApi().model_info(wanted.name, revision=wanted.revision)
            except MemoryError:
                raise
            except Exception as e:  # of the client, its HTTP library, or the network: they have no common one
                if isinstance(e, self._hub.errors.HfHubHTTPError) or self._cached_config() is None:
                    raise
            else:
                self.files = [str(file.rfilename) for file in found.siblings or []]

    def fetch(self, patterns: Iterable[str]) -> Path:
        """The snapshot's folder, once the files of these names are in it. What is there is not fetched again."""
        chosen = [name for name in self.files if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        with self._errors():
            return Path(
                self._hub.snapshot_download(
                    self.id.name, revision=self.id.revision, allow_patterns=[glob.escape(name) for name in chosen]
                )
            )

    def cached(self) -> Path:
        """The snapshot's folder with what was fetched before."""
        found = self._cached_config()
        assert found is not None
        return found

    def _cached_config(self) -> Path | None:
        for name in ("config.json", "adapter_config.json"):
            found = self._hub.try_to_load_from_cache(self.id.name, name, revision=self.id.revision)
            if isinstance(found, str):
                return Path(found).parent
        return None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the client raises becomes a HubError with what to do."""
        errors = self._hub.errors
        try:
            yield
        except (EdgeError, MemoryError):
            raise
        except errors.GatedRepoError as e:
            raise HubError(
                f"{self.id} is gated: accept its licence at {self._hub.constants.ENDPOINT}/{self.id.name}, and log in: "
                "hf auth login, or set HF_TOKEN"
            ) from e
        except errors.RepositoryNotFoundError as e:
            raise HubError(
                f"{self.id} is no folder here and not on the hub, or is private; check the name, or log in: "
                "hf auth login, or set HF_TOKEN"
            ) from e
        except errors.RevisionNotFoundError as e:
            raise HubError(
                f"{self.id.name} has no revision {self.id.revision}; name a branch, a tag or a commit"
            ) from e
        except errors.OfflineModeIsEnabled as e:
            raise HubError(
                f"{self.id} is no folder here and not in the cache, and HF_HUB_OFFLINE is set; unset it, or fetch it "
                f"where there is a network: hf download {self.id.name}"
            ) from e
        except errors.HfHubHTTPError as e:
            raise HubError(f"the hub does not give {self.id} ({_first_line(e)}); try again later") from e
        except Exception as e:
            raise self._explained(e) from e

    def _explained(self, e: Exception) -> EdgeError:
        if _errno(e) == errno.ENOSPC:
            return HubError(
                f"no space is left in {self._hub.constants.HF_HUB_CACHE}; free some, or name another folder with "
                "HF_HOME. What is there stays, the same command goes on"
            )
        if isinstance(e, self._hub.errors.LocalEntryNotFoundError) or not self.files:
            return HubError(
                f"{self.id} is no folder here, and the hub cannot be reached for it ({_first_line(e)}); check the name "
                "or the network, or copy the folder from a machine that has it"
            )
        return HubError(
            f"fetching {self.id} broke off ({_first_line(e)}); the same command goes on with what is missing"
        )


def _client(wanted: HubId) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as e:
        name = wanted.name.split("/")[1]
        raise HubError(
            f"{wanted} is an id of the hub, which needs the Python package huggingface_hub: {install_advice('hub')}; "
            f"or on another machine: hf download {wanted.name} --local-dir {name}, and copy that folder here"
        ) from e
    return huggingface_hub


def _errno(e: BaseException | None) -> int | None:
    """The system's number of an error, or of what caused it."""
    while e is not None:
        if isinstance(e, OSError) and e.errno is not None:
            return e.errno
        e = e.__cause__ or e.__context__
    return None


def _first_line(e: BaseException) -> str:
    """What the system says of the failure at the bottom, else what the client says."""
    text = " ".join(str(e).split())
    deepest: BaseException | None = e
    while deepest is not None:
        if isinstance(deepest, OSError) and deepest.strerror:
            text = deepest.strerror
        deepest = deepest.__cause__ or deepest.__context__
    return text[:200] or type(e).__name__
