"""The three modules that are traced: what the hub's contract cuts out of transformers' model, on transformers' own
layers.

Written anew is only what a trace would freeze: loops over views with Python numbers, and caches that are filled in
place. Sizes of example inputs all differ, so that no two axes are taken for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Lfm2VlForConditionalGeneration


class VisionEncoder(nn.Module):
    """Patches of views of any grids → image tokens. Cut here: it runs once an image, and its output is all the decoder
    needs of it.
    """

    def __init__(self, model: Lfm2VlForConditionalGeneration) -> None:
        super().__init__()
        self.config = model.config
        self.vision = model.model.vision_tower.vision_model
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> dict[str, Tensor]:
        """[n, p, 768], [n, p], [n, 2] → image_features [image tokens, H]."""
        rows, columns = spatial_shapes[:, :1], spatial_shapes[:, 1:]
        x = self.vision.embeddings.patch_embedding(pixel_values) + self._positions(pixel_values.shape[1], rows, columns)
        mask = (1.0 - pixel_attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        x = self.vision.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state
        tokens = self._pixel_unshuffle(self.vision.post_layernorm(x), rows, columns)
        projector = self.projector
        return {"image_features": projector.linear_2(projector.act(projector.linear_1(projector.layer_norm(tokens))))}

    def _positions(self, patches: int, rows: Tensor, columns: Tensor) -> Tensor:
        """transformers resizes the position table view by view, with interpolate(antialias=True), which is no ONNX
        operator. The same as two small matrices: entry j of the table has the triangle weight max(0, 1 - |j + 0.5 - (p
        + 0.5)·s| / max(s, 1)) in position p, s = side / length, normalised.
        """
        embeddings = self.vision.embeddings
        side = embeddings.position_embedding_size
        index = torch.arange(patches)[None]
        by_row = _triangle(torch.minimum(index // columns, rows - 1), rows, side)
        by_column = _triangle(index % columns, columns, side)
        both = by_row[:, :, :, None] * by_column[:, :, None, :]  # [n, p, side, side]
        return both.flatten(2) @ embeddings.position_embedding.weight

    def _pixel_unshuffle(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """[n, p, C] → [image tokens, factor²·C]: every factor × factor patches side by side, padding dropped."""
        factor = self.projector.factor
        wide = columns // factor
        index = torch.arange(x.shape[1] // factor**2)[None]  # [1, tokens of the longest view]
        first = (index // wide) * factor * columns + (index % wide) * factor
        inner = torch.arange(factor)
        offsets = (columns[:, :, None] * inner[None, :, None] + inner).flatten(1)  # [n, factor²], row major
        places = (first[:, :, None] + offsets[:, None, :]).clamp(max=x.shape[1] - 1)  # [n, tokens, factor²]
        gathered = torch.gather(x, 1, places.flatten(1)[:, :, None].expand(-1, -1, x.shape[2]))
        tokens = gathered.reshape(x.shape[0], -1, factor**2 * x.shape[2])
        return tokens[index < wide * (rows // factor)]


def _triangle(position: Tensor, length: Tensor, side: int) -> Tensor:
    """[n, p] positions on axes of [n, 1] cells → weights of the table's entries [n, p, side]."""
    scale = side / length.to(torch.float32)
    center = (position.to(torch.float32) + 0.5) * scale
    distance = (torch.arange(side).to(torch.float32) + 0.5 - center[:, :, None]).abs() / scale.clamp(min=1.0)[
        :, :, None
    ]
    weights = torch.relu(1.0 - distance)
    return weights / weights.sum(-1, keepdim=True)


class EmbedTokens(nn.Module):
    """ids → embeddings: apart, because image tokens take the place of some of them."""

    def __init__(self, model: Lfm2VlForConditionalGeneration) -> None:
        super().__init__()
        self.config = model.config
        self.table = model.model.language_model.embed_tokens

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return inputs_embeds [B, S, H] of input_ids [B, S]."""
        return {"inputs_embeds": self.table(input_ids)}


class Decoder(nn.Module):
    """S new embeddings after P past ones → logits of the last position. State comes in as inputs and goes out as
    outputs.
    """

    def __init__(self, model: Lfm2VlForConditionalGeneration) -> None:
        super().__init__()
        self.config = model.config
        self.text = model.model.language_model
        self.head = model.lm_head

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, past_conv: list[Tensor], past_attention: list[Tensor]
    ) -> dict[str, Tensor]:
        """[B, S, H], [B, P + S], and in layer order each convolution's [B, H, kernel], each attention's key and value
        [B, heads, P, D].
        """
        tokens, total = inputs_embeds.shape[1], attention_mask.shape[1]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        rotary = self.text.pos_emb(inputs_embeds, positions)
        # A token sees what is not after it and not padding.
        causal = torch.arange(total)[None] <= (torch.arange(tokens) + total - tokens)[:, None]
        seen = causal[None] & (attention_mask[:, None, :] > 0)
        mask = torch.where(seen, 0.0, torch.finfo(inputs_embeds.dtype).min)[:, None]
        real = attention_mask[:, None, -tokens:].to(inputs_embeds.dtype)

        states: dict[str, Tensor] = {}
        convs, attentions = iter(past_conv), iter(zip(past_attention[::2], past_attention[1::2], strict=True))
        x = inputs_embeds
        for i, layer in enumerate(self.text.layers):
            normed = layer.operator_norm(x)
            if layer.is_attention_layer:
                past = _Past(*next(attentions))
                mixed, _ = layer.self_attn(normed, rotary, mask, past_key_values=past)
                states |= {f"present.{i}.key": past.key, f"present.{i}.value": past.value}
            else:
                mixed, states[f"present_conv.{i}"] = _short_conv(layer.conv, normed, next(convs), real)
            x = x + mixed
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return {"logits": self.head(self.text.embedding_norm(x[:, -1:])), **states}


class _Past:
    """What transformers' attention asks of a cache: keys and values so far, with the new ones behind them."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        return self.key, self.value


def _short_conv(conv: Any, x: Tensor, past: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' gated convolution over its past and the new inputs: (output [B, S, H], state [B, H, kernel]).
    `real` [B, 1, S]: padding is zero to it.
    """
    b, c, signal = conv.in_proj(x).transpose(1, 2).chunk(3, 1)
    full = torch.cat([past, b * signal * real], 2)  # [B, H, kernel + S]; the oldest is never read
    convolved = nn.functional.conv1d(full[:, :, 1:], conv.conv.weight, conv.conv.bias, groups=conv.conv.groups)
    return conv.out_proj((c * convolved).transpose(1, 2)), full[:, :, -past.shape[2] :]
