"""Milliseconds on a board where nobody has measured, as a range: the operations and bytes of the model against what the
board can do at most (the profile's [board]), times the share of it that kernels reach.

The shares are those of products on prompts and images and of reading weights for a token. The least and the most are a
factor of two apart, and were set so that what is published for a Pi 5 lies inside: LFM2.5-350M in int8, by another
engine, 200 tok/s of a prompt and 30 tok/s; LFM2.5-230M 42 tok/s. On two processors of an EPYC with AVX-512 VNNI, taken
as whole cores at 4 GHz, int8 products reach 0.39 of the peak and fp32 products 0.38; an encoder's attention takes 0.68
times as long in int8 as in fp32. On Arm nothing has been measured in time, but instructions have been counted
(scripts/bench/instructions.py, onnxruntime from 1.24 on): 4-bit weights take as many as int8's on a Cortex-A76, which
has dot products; on a Cortex-A72, which has none, 1.5 times as many for a prompt, and 6 times as many for a token.

Every run of a graph also takes time for each of its nodes, which is most of a small model's token: 1.3 to 3.5 µs on
that EPYC, of the demo model. A Pi 5 is taken to need 2 to 4, others more or less as their peak in fp32 is below or
above its.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lfm_profiles.schema import Board

from lfm_runtime.decode.context import MOST_AT_ONCE
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.contract import DECODER, VISION_ENCODER, number_of
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.formats.manifest import ModelFacts
from lfm_runtime.formats.onnx_file import node_count, operators
from lfm_runtime.setup.forecast import Forecast
from lfm_runtime.setup.memory import weights_of
from lfm_runtime.setup.setup import Setup

_SHARES = {"fp32": (0.4, 0.8), "fp16": (0.4, 0.8), "int8": (0.17, 0.34), "int4": (0.16, 0.32)}
_INT4_WITHOUT_DOT_PRODUCTS = {"prompt": (0.1, 0.2), "token": (0.06, 0.12)}
_READING = (0.45, 0.9)
_ATTENTION_IN_INT8 = 0.68  # of its time in fp32
_NODE_US, _OF_GFLOPS = (2.0, 4.0), 153.6


@dataclass(frozen=True)
class Range:
    """The least and the most, in ms."""

    least: float
    most: float

    def __add__(self, other: Range) -> Range:
        return Range(self.least + other.least, self.most + other.most)

    def or_longer(self, other: Range) -> Range:
        """Of two limits, the one that holds."""
        return Range(max(self.least, other.least), max(self.most, other.most))


@dataclass(frozen=True)
class Vision:
    """Sizes of the vision tower and projector."""

    hidden: int
    feed_forward: int
    layers: int
    pixels: int  # of a patch, all channels
    factor: int  # patches along a side of an image token's square
    projector: int

    @staticmethod
    def of(config: dict[str, Any]) -> Vision:
        """From config.json; a KeyError, TypeError or ValueError where it does not say them."""
        tower = config["vision_config"]
        hidden, feed_forward, layers = (
            int(tower[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
        )
        pixels = int(tower["patch_size"]) ** 2 * int(tower.get("num_channels", 3))
        return Vision(
            hidden,
            feed_forward,
            layers,
            pixels,
            int(config.get("downsample_factor", 2)),
            int(config["projector_hidden_size"]),
        )

    def products(self, patches: int, text_hidden: int) -> float:
        """Operations of the products with weights: two a weight and patch, or image token."""
        tower = self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.feed_forward) + self.pixels * self.hidden
        projector = self.projector * (self.hidden * self.factor**2 + text_hidden)
        return 2.0 * patches * tower + 2.0 * patches / self.factor**2 * projector

    def attention(self, patches: int) -> float:
        """Operations of scores and of the values' sums."""
        return 4.0 * patches**2 * self.hidden * self.layers


def text_weights(model: ModelFacts) -> int:
    """Weights of the decoder's products that each token of a prompt meets: all but the head."""
    if model.feed_forward is None:
        raise ValueError("feed_forward")
    keys = model.kv_heads * model.head_dim
    mixer = {"conv": 4 * model.hidden**2, "full_attention": 2 * model.hidden**2 + 2 * model.hidden * keys}
    return sum(mixer[kind] + 3 * model.hidden * model.feed_forward for kind in model.layers)


def products_ms(operations: float, number: str, board: Board, rows: str = "prompt") -> Range:
    """Of matrix products with weights of such numbers, for rows of a `prompt` or an image, or for a `token` alone."""
    assert board.int8_gops
    assert board.fp32_gflops
    peak = board.fp32_gflops if number in ("fp32", "fp16") else board.int8_gops
    dot_products = board.int8_gops > 2 * board.fp32_gflops
    low, high = _INT4_WITHOUT_DOT_PRODUCTS[rows] if number == "int4" and not dot_products else _SHARES[number]
    return Range(operations / peak / high / 1e6, operations / peak / low / 1e6)


def reading_ms(weights: float, board: Board) -> Range:
    """Of reading so many bytes."""
    assert board.read_gb_s
    low, high = _READING
    return Range(weights / board.read_gb_s / high / 1e6, weights / board.read_gb_s / low / 1e6)


def calls_ms(nodes: int, board: Board) -> Range:
    """Of calling so many operators, whatever they compute."""
    assert board.fp32_gflops
    least, most = (us * _OF_GFLOPS / board.fp32_gflops / 1e3 for us in _NODE_US)
    return Range(nodes * least, nodes * most)


def foreseen_ms(setup: Setup, forecast: Forecast) -> dict[str, Range] | None:
    """Stages, first token (without opening the image) and each further one on the profile's board; None where the
    profile knows no board, or a hub folder tells too little.
    """
    board, bundle, model = setup.profile.board, setup.bundle, setup.bundle.facts
    if not (board.fp32_gflops and board.int8_gops and board.read_gb_s) or model is None or model.feed_forward is None:
        return None
    if setup.execution.on_gpu:
        return None
    path = bundle.folder / "config.json"
    with damage_is(BundleError, path, "export the bundle again"):
        vision = Vision.of(read_json_object(path, BundleError))
    encoder, decoder = setup.paths[VISION_ENCODER.stem], setup.paths[DECODER.stem]
    reader = bundle.graphs(setup.prefill)[1][DECODER.stem] if setup.prefill else decoder
    in_integers = "Scan" in operators(encoder, nested=True)  # attention, head by head
    images = Range(0, 0)
    for patches in _patches(forecast):
        images += calls_ms(node_count(encoder), board)
        images += products_ms(vision.products(patches, model.hidden), number_of(VISION_ENCODER, encoder), board)
        attention = vision.attention(patches) * (_ATTENTION_IN_INT8 if in_integers else 1)
        images += products_ms(attention, "fp32", board)
    weights = text_weights(model)
    head = model.hidden * model.vocabulary
    reads = reading_ms(weights_of(bundle, reader), board)
    prompt = products_ms(2.0 * (weights * forecast.prompt_tokens + head), number_of(DECODER, reader), board).or_longer(
        reads
    )
    prompt += calls_ms(node_count(reader) * -(-forecast.prompt_tokens // MOST_AT_ONCE), board)
    kept = 8 * sum(kind == "full_attention" for kind in model.layers) * model.kv_heads * model.head_dim
    token = reading_ms(weights_of(bundle, decoder) + kept * forecast.prompt_tokens, board)
    token = token.or_longer(products_ms(2.0 * (weights + head), number_of(DECODER, decoder), board, "token"))
    token += calls_ms(node_count(decoder), board)
    return {"vision": images, "prefill": prompt, "ttft": images + prompt, "per_token": token}


def _patches(forecast: Forecast) -> Sequence[int]:
    return [view.rows * view.columns for image in forecast.images for view in image.views]
