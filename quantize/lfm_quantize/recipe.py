"""A recipe: which matrix product is kept at which precision. TOML, readable, written into the manifest and accepted
back.

[[layer]]
pattern = "vision.*"            # of the product's name; the first rule that matches decides
bits = 8
method = "rtn"
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lfm_quantize.graph import QuantizeError
from lfm_quantize.rounding import COMPENSATING, METHODS, Precision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

BLOCKS = (32, 64, 128, 256)
FEED_FORWARD = "text.layers.*.feed_forward.*"
_KEYS = {"pattern", "bits", "block", "method", "zero_points"}


@dataclass(frozen=True)
class Rule:
    """Products whose name matches `pattern` (`*` is anything) have this precision."""

    pattern: str
    precision: Precision


@dataclass(frozen=True)
class Recipe:
    """Rules in order; the first that matches decides. A product that none matches stays fp32."""

    rules: tuple[Rule, ...]

    def precision(self, name: str) -> Precision:
        """Of one product."""
        return next((rule.precision for rule in self.rules if fnmatchcase(name, rule.pattern)), Precision(32))

    def attends_in_integers(self, name: str) -> bool:
        """Whether an attention is to be tried in 8 bits: the first rule that matches and is for attentions, or keeps
        what it matches fp32, decides. Others, such as 8 bits for `vision.*`, are for products.
        """
        matching = (rule for rule in self.rules if fnmatchcase(name, rule.pattern))
        bits = (r.precision.bits for r in matching if r.pattern.endswith("attention") or r.precision.bits == 32)
        return next(bits, 32) == 8

    def check(self, names: Iterable[str]) -> None:
        """Raise QuantizeError when a pattern matches no product: it would be a typo without effect."""
        matching([rule.pattern for rule in self.rules], names)

    def keeping(self, patterns: Sequence[str]) -> Recipe:
        """With products that stay fp32 put first."""
        return Recipe((*(Rule(p, Precision(32)) for p in patterns), *self.rules))

    def to_toml(self) -> str:
        """The recipe as a file."""
        lines = []
        for rule in self.rules:
            p = rule.precision
            lines += ["[[layer]]", f'pattern = "{rule.pattern}"', f"bits = {p.bits}"]
            lines += [f"block = {p.block}"] if p.bits == 4 else []
            lines += [f'method = "{p.method}"'] if p.bits != 32 else []
            lines += ["zero_points = true"] if p.zero_points else []
            lines.append("")
        return "\n".join(lines)

    def to_list(self) -> list[dict[str, Any]]:
        """For the manifest."""
        return [{"pattern": rule.pattern, **asdict(rule.precision)} for rule in self.rules]

    @staticmethod
    def read(path: Path) -> Recipe:
        """Read a recipe file.

        Raises:
            QuantizeError: not TOML, an unknown key or an impossible value; names the rule.
        """
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
            raise QuantizeError(f"{path} cannot be read as a recipe ({e}); it is TOML with [[layer]] tables") from e
        layers = raw.get("layer")
        if set(raw) != {"layer"} or not isinstance(layers, list) or not layers:
            raise QuantizeError(
                f"{path} is not a recipe; it is made of [[layer]] tables with pattern, bits, block, method"
            )
        return Recipe(tuple(_rule(entry, f"{path}, layer {i}") for i, entry in enumerate(layers, 1)))

    @staticmethod
    def default(variant: str, method: str, *, quick: bool = False) -> Recipe:
        """What a variant is without a search: int8 everywhere; or int8 vision and a 4-bit decoder. Where GPTQ makes up
        for what coarse scales lose, a scale is for 256 inputs in the feed-forward layers, which are three quarters
        of the weights, and for 128 elsewhere; else for 64. `quick`: without GPTQ where it gains least, on 8-bit
        weights, and elsewhere in parts of wide matrices.
        """
        eight = Precision(8, 0, "rtn" if quick else method)
        if variant == "int8":
            return Recipe((Rule("*", eight),))
        images = (Rule("vision.*", eight), Rule("projector.*", eight))
        if method not in COMPENSATING:
            return Recipe((*images, Rule("*", Precision(4, 64, method))))
        narrow, wide = (Precision(4, block, "gptq-local" if quick else method) for block in (128, 256))
        return Recipe((*images, Rule(FEED_FORWARD, wide), Rule("*", narrow)))


def matching(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that a pattern matches, in order.

    Raises:
        QuantizeError: a pattern that matches none.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            like = next((name for name in reversed(names) if ".layers." in name), names[-1])
            raise QuantizeError(f"pattern {pattern!r} matches no layer of this model; layers are named like {like}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _rule(entry: Any, where: str) -> Rule:
    unknown = sorted(set(entry) - _KEYS) if isinstance(entry, dict) else []
    if unknown:
        raise QuantizeError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(sorted(_KEYS))}")
    if not isinstance(entry, dict) or not isinstance(entry.get("pattern"), str) or "bits" not in entry:
        raise QuantizeError(f"{where}: pattern (text) and bits are needed")
    bits, block, method = entry["bits"], entry.get("block", 64 if entry["bits"] == 4 else 0), entry.get("method", "rtn")
    if type(bits) is not int or bits not in (4, 8, 32):
        raise QuantizeError(f"{where}: bits {bits!r}; allowed: 4, 8, 32")
    if bits == 4 and entry["pattern"].endswith("attention"):
        raise QuantizeError(f"{where}: attention is computed in 8 bits or in fp32, bits = 32")
    if bits == 4 and (type(block) is not int or block not in BLOCKS):
        raise QuantizeError(f"{where}: block {block!r}; allowed: {', '.join(map(str, BLOCKS))}")
    if bits != 4 and ("block" in entry or "zero_points" in entry):
        raise QuantizeError(f"{where}: block and zero_points have an effect only with bits = 4; leave them out")
    if not isinstance(method, str) or method not in METHODS:
        raise QuantizeError(f"{where}: unknown method {method!r}; allowed: {', '.join(METHODS)}")
    if not isinstance(entry.get("zero_points", False), bool):
        raise QuantizeError(f"{where}: zero_points is true or false")
    return Rule(entry["pattern"], Precision(bits, block if bits == 4 else 0, method, entry.get("zero_points", False)))
