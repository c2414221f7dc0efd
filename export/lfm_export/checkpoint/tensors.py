"""safetensors files read tensor by tensor, never mapped: mapped pages would count against the export's memory bound.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes
(https://github.com/huggingface/safetensors). bfloat16 has no numpy type; its 16 bits are the upper half of a float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lfm_runtime.errors import command, unreadable
from lfm_runtime.formats.files import check_no_pointer, read_json_object
from numpy.typing import NDArray

from lfm_export.checkpoint.config import CheckpointError

Floats = NDArray[np.float32]
_ITEM = {"BF16": 2, "F16": 2, "F32": 4}
_CHUNK = 1 << 24
_MAX_HEADER = 100 << 20  # the safetensors library's own limit


@dataclass(frozen=True)
class Entry:
    """File, dtype, shape and byte range of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class TensorStore:
    """All tensors of a checkpoint folder, by name; reads only what is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _header(file).items():
                if name in self.entries:
                    raise CheckpointError(
                        f"tensor {name} is in both {self.entries[name].file.name} and {file}; remove it from one "
                        "of them"
                    )
                self.entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str, shape: tuple[int, ...]) -> Entry:
        """The tensor's place, after checking that it is there, of `shape`, and of a floating type we read."""
        if name not in self.entries:
            raise CheckpointError(
                f"tensor {name} is missing from the checkpoint; download it again or check config.json"
            )
        found = self.entries[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{found.file}: tensor {name} has shape {list(found.shape)}, config.json asks for {list(shape)}"
            )
        if found.dtype not in _ITEM:
            raise CheckpointError(
                f"{found.file}: tensor {name} has dtype {found.dtype}; only {', '.join(_ITEM)} can be exported"
            )
        return found

    def read(self, name: str, shape: tuple[int, ...]) -> Floats:
        """Return the whole tensor as float32; raises CheckpointError where it is missing or of another shape."""
        return np.concatenate(list(self.chunks(name, shape))).reshape(shape)

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[Floats]:
        """The tensor as flat float32 pieces of at most 16 MiB of source bytes, in order."""
        entry = self.entry(name, shape)
        try:
            with entry.file.open("rb") as f:
                f.seek(entry.offset)
                for at in range(0, entry.bytes, _CHUNK):
                    data = f.read(min(entry.bytes - at, _CHUNK))
                    if not data or len(data) % _ITEM[entry.dtype]:
                        raise CheckpointError(f"{entry.file} became shorter while it was read; export again")
                    yield _finite(_to_float32(data, entry.dtype), name, entry)
        except OSError as e:
            raise unreadable(entry.file, e, CheckpointError, "copy or download it again") from e


def _finite(values: Floats, name: str, entry: Entry) -> Floats:
    """`values`; raises CheckpointError where one is NaN or infinite. A sum is three times as fast as isfinite and tells
    of both.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()
    if not np.isfinite(total) and not np.isfinite(values).all():
        raise CheckpointError(f"{entry.file}: tensor {name} has NaN or infinite values; training may have failed")
    return values


def _to_float32(data: bytes, dtype: str) -> Floats:
    if dtype == "F32":
        return np.frombuffer(data, np.float32)
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def check_folder(folder: Path) -> None:
    """Raise CheckpointError for what is no checkpoint folder, with the one that was meant."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder it lies in: {folder.parent}")
    if not folder.is_dir():
        hub_id = len(folder.parts) == 2 and not folder.is_absolute() and folder.parts[0] not in (".", "..")
        how = (
            f"check the path, or download it: hf download {folder} --local-dir {folder.name}"
            if hub_id
            else "give that of a Hugging Face checkpoint"
        )
        raise CheckpointError(f"{folder} is not a folder; {how}")
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} is a PEFT adapter; export the model that it was trained on with --adapter {folder}"
        )
    if (folder / "snapshots").is_dir():  # models--owner--name of the hub's cache
        reference = folder / "refs" / "main"
        revisions = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
        wanted = (
            folder / "snapshots" / reference.read_text(encoding="utf-8", errors="replace").strip()
            if reference.is_file()
            else None
        )
        meant = wanted if wanted in revisions else revisions[-1] if revisions else None
        if meant is not None:
            raise CheckpointError(f"{folder} is a folder of the hub's cache; give one of its snapshots: {meant}")
    inside = sorted(path.parent for path in folder.glob("*/config.json") if any(path.parent.glob("*.safetensors")))
    if inside:
        others = f" (or another of {len(inside)})" if len(inside) > 1 else ""
        raise CheckpointError(f"{folder} has no config.json; the checkpoint is inside: {inside[0]}{others}")
    if not any(path.suffix in (".safetensors", ".bin", ".gguf") for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has neither config.json nor weights; name another folder"
        )


def checkpoint_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names.

    Raises:
        CheckpointError: neither is there, a shard is missing, or the weights are in another format.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        if (folder / "manifest.json").exists():
            raise CheckpointError(f"{folder} is a bundle already, not a checkpoint; {command('run', folder)} uses it")
        found = sorted(
            path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf", "*.npz") for path in folder.glob(pattern)
        )
        if found and found[0].endswith(".gguf"):
            raise CheckpointError(
                f"{folder} has {found[0]}, whose weights llama.cpp has changed; export the original checkpoint"
            )
        if found:
            raise CheckpointError(
                f"{folder} has {found[0]}, no model.safetensors; load it with transformers and save it: save_pretrained"
            )
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; download the checkpoint again"
        )
    weight_map = read_json_object(index, CheckpointError, advice="download the checkpoint again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download the checkpoint again")
    shards = [folder / str(name) for name in sorted({str(name) for name in weight_map.values()})]
    for shard in shards:
        if shard.parent != folder:
            raise CheckpointError(f"{index} names {shard}, outside the checkpoint folder")
        if not shard.exists():
            raise CheckpointError(f"shard {shard} is missing; {index.name} names it: download it")
    return shards


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _header(file: Path) -> dict[str, Entry]:
    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"{file} is truncated or damaged ({why}); download it again")

    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            text = f.read(length) if length <= min(size - 8, _MAX_HEADER) else b""
    except OSError as e:
        raise unreadable(file, e, CheckpointError, "the export needs it") from e
    check_no_pointer(file, CheckpointError)
    if size < 8 or len(text) != length:
        raise damaged(f"{size} bytes, header of {length}")
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as e:
        raise damaged("its header is not JSON") from e
    start = 8 + length
    entries: dict[str, Entry] = {}
    try:
        for name, info in header.items():
            if name == "__metadata__":
                continue
            begin, end = (int(x) for x in info["data_offsets"])
            shape = tuple(int(x) for x in info["shape"])
            if not 0 <= begin <= end <= size - start:
                raise damaged(f"tensor {name} ends at byte {start + end} of {size}")
            item = _ITEM.get(info["dtype"])
            if item and end - begin != item * int(np.prod(shape, dtype=np.int64)):
                raise damaged(f"tensor {name} has {end - begin} bytes for shape {list(shape)}")
            entries[name] = Entry(file, info["dtype"], shape, start + begin, end - begin)
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise damaged(f"a header entry is incomplete: {e}") from e
    return entries
