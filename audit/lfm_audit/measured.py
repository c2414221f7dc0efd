"""Keeps an audit's figures as costs that plans read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from lfm_runtime.bundle import Bundle
from lfm_runtime.setup.costs import Costs, Pairs, cost_key, keep_costs

from lfm_audit.result import Audit


def keep_measured(bundle: Bundle, audit: Audit) -> None:
    """Remember an audit's figures beside what was prepared for this machine."""
    known = {}
    for variant, found in audit.variants.items():
        decoded, cut, vision, prefill = (defaultdict[int, list[float]](list) for _ in range(4))
        for name, image in found.images.items():
            size, stages = audit.workload.images[name], image.stages
            if image.views:
                # Views of one image differ in size (thumbnails): means of both, so that sums agree. A token is 2 × 2
                # patches.
                cut[4 * image.image_tokens].append(stages.preprocess_ms.median)
                vision[round(4 * image.image_tokens / image.views)].append(stages.vision_ms.median / image.views)
            prefill[image.prompt_tokens].append(stages.prefill_ms.median)
            decoded[size.width * size.height].append(stages.image_ms.median)
        # Of whole answers, pauses included: the median step is shorter where something now and then disturbs.
        steps = [
            1e3 / rate for image in found.images.values() if image.decode_tok_s and (rate := image.decode_tok_s.median)
        ]
        if steps:
            low_memory, weights = bool(found.settings["low_memory"]), audit.bundle.fingerprint[variant]
            known[cost_key(variant, found.prefill, found.threads, weights, low_memory=low_memory)] = Costs(
                _pairs(decoded),
                _pairs(cut),
                _pairs(vision),
                _pairs(prefill),
                float(np.median(steps)),
                max(image.stages.load_ms.median for image in found.images.values()),
                audit.verdict.valid,
            )
    keep_costs(bundle, known)


def _pairs(found: Mapping[int, Sequence[float]]) -> Pairs:
    """Of images that are as large the median."""
    return tuple((many, float(np.median(ms))) for many, ms in sorted(found.items()))
