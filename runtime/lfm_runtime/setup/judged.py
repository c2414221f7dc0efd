"""Whether a variant's loss was measured as the variant runs: with its prefill decoder and its image settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfm_profiles.schema import IMAGE_SETTINGS


def judged_otherwise(quality: Mapping[str, Any], prefill: str | None, changes: Sequence[str] | None) -> str:
    """How the loss was measured, in a few words, where the variant runs otherwise; "" where it runs so.

    Args:
        quality: the manifest's entry, of any writer.
        prefill: the prefill decoder that the variant runs with.
        changes: what changes the checkpoint's image settings, as `departures` says it; None: not known.
    """
    board = quality.get("board")
    board = board if isinstance(board, Mapping) else {}
    found = board.get("changes")
    judged = [c for c in found if str(c).split(" ")[0] in IMAGE_SETTINGS] if isinstance(found, list | tuple) else []
    parts = []
    if judged and set(judged) != set(changes or ()):
        parts.append(f"as {board.get('profile')} ({', '.join(judged)})")
    elif changes and not judged:
        parts.append("with the checkpoint's image settings")
    if board.get("prefill") != prefill:
        parts.append(f"with {board['prefill']} for the prefill" if board.get("prefill") else "alone")
    return ", ".join(parts)
