"""Train the demo model: the true architecture, 5.9 M parameters, on pictures drawn by demo_data.py.

    python demo/make/train_demo.py demo/checkpoint --minutes 80

Wall-clock driven: the three stages and the learning-rate schedule are fractions of `--minutes`, so the same command
uses a slow or a fast machine fully. Needs the `test` extra (torch, transformers, tokenizers, matplotlib). What made it
learn: dense labels on the vision patches first (linear heads, thrown away at the end), Muon on the matrices with AdamW
on the rest, and a final decay of the learning rate to zero.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import demo_data
import numpy as np
import torch
import torch.nn.functional as F
from demo_checkpoint import build_model, save_checkpoint, train_tokenizer
from tokenizers import Tokenizer
from torch import nn
from transformers import Lfm2VlForConditionalGeneration

MUON_LR, ADAM_LR = 6e-3, 1.5e-3
# Parts of the time given: dense labels alone, then conversations about 128×128 pictures, then all sizes, then decay to
# 0.
VISION_ALONE_UNTIL, MIXED_SIZES_FROM, DECAY_FROM = 0.08, 0.40, 0.50
LOSS_WEIGHT = {"describe": 1.0, "count": 3.0, "where": 2.0, "read": 1.0}


class Trainee(nn.Module):
    """The model with a batched forward for pictures of one size, and the dense heads that training alone uses."""

    def __init__(self, model: Lfm2VlForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.head = nn.Linear(width, 31 + 37 + 7)

    def vision(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """pixels [n, rows·cols, 768] → patch features [n, rows·cols, width]."""
        tower = self.model.model.vision_tower.vision_model
        table = tower.embeddings.position_embedding.weight
        table = table.reshape(16, 16, -1).permute(2, 0, 1)[None]
        table = F.interpolate(table, size=grid, mode="bilinear", align_corners=False, antialias=True)
        hidden = tower.embeddings.patch_embedding(pixels) + table[0].flatten(1).T
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return tower.post_layernorm(hidden)

    def dense_loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed cross-entropy for labels int64 [3, n, patches]: shape, character, slot."""
        parts = self.head(features).split([31, 37, 7], dim=-1)
        total = features.new_zeros(())
        for part, wanted, n in zip(parts, labels, (31, 37, 7), strict=True):
            weight = torch.ones(n)
            weight[0] = 0.15
            total = total + F.cross_entropy(part.flatten(0, 1), wanted.flatten(), weight=weight)
        return total

    def forward(self, pixels, grid, labels, ids, start, targets, weights):
        features = self.vision(pixels, grid)
        n, _, width = features.shape
        image = self.model.model.multi_modal_projector(features.reshape(n, *grid, width)).flatten(1, 2)
        language = self.model.model.language_model
        embeds = language.embed_tokens(ids)
        embeds = torch.cat([embeds[:, :start], image, embeds[:, start + image.shape[1] :]], dim=1)
        hidden = language(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
        keep = weights > 0
        logits = self.model.lm_head(hidden[keep])
        loss = F.cross_entropy(logits, targets[keep], reduction="none")
        text = (loss * weights[keep]).sum() / weights.sum()
        return text, self.dense_loss(features, labels)


def faster_short_conv(model: Lfm2VlForConditionalGeneration) -> None:
    """Depthwise convolution as three shifted multiply-adds: the same numbers as conv1d."""

    def forward(self, hidden_states, **_):
        b, c, x = self.in_proj(hidden_states).chunk(3, dim=-1)
        bx = F.pad(b * x, (0, 0, 2, 0))
        n = hidden_states.shape[1]
        w = self.conv.weight[:, 0, :]
        return self.out_proj(c * (bx[:, :n] * w[:, 0] + bx[:, 1 : n + 1] * w[:, 1] + bx[:, 2:] * w[:, 2]))

    for layer in model.model.language_model.layers:
        if not layer.is_attention_layer:
            layer.conv.forward = forward.__get__(layer.conv)


# ------------------------------------------------------------------------------------------------------------- batch


def same_colour(sample: demo_data.Sample) -> list[tuple[str, str, str]]:
    """The `where` questions about things that share their colour with another thing."""
    things = sample.questions[0][2].split(", ")
    colours = [thing.split()[0] for thing in things]
    return [q for q in sample.questions if q[0] == "where" and colours.count(q[1].split()[3]) > 1]


class Batcher:
    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = random.Random(seed)
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        self.cache: dict[str, list[int]] = {}
        self.encode = lambda text: self.cache.setdefault(text, encode(text)) if len(text) < 60 else encode(text)
        self.image_id = tokenizer.token_to_id("<image>")
        self.head = encode("<|startoftext|><|im_start|>user\n<|image_start|>")

    def draw(self, kind: str, width: int, height: int) -> demo_data.Sample:
        """Most pictures of shapes with a `where` that the colour alone does not answer: without them the model reads no
        shape word.
        """
        while True:
            sample = demo_data.draw_sample(self.rng, kind, width, height)
            if kind == "text" or self.rng.random() < 0.2 or same_colour(sample):
                return sample

    def conversation(self, sample: demo_data.Sample, image_tokens: int, turns: int) -> tuple[list[int], list[float]]:
        """Token ids and, for each, the loss weight of predicting it (0 outside the answers)."""
        questions = list(sample.questions)
        self.rng.shuffle(questions)
        if self.rng.random() < 0.75:  # a description tells all later answers: mostly ask it last, or first and alone
            hard = same_colour(sample)
            questions.sort(key=lambda q: (q[0] == "describe", q not in hard))
            if self.rng.random() < 0.25:
                questions = questions[-1:]
        ids = self.head + [self.image_id] * image_tokens
        weights = [0.0] * len(ids)
        for i, (task, question, answer) in enumerate(questions[:turns]):
            asked = self.encode(
                ("<|image_end|>" if i == 0 else "\n<|im_start|>user\n")
                + question
                + "<|im_end|>\n<|im_start|>assistant\n"
            )
            said = self.encode(answer + "<|im_end|>")
            ids = ids + asked + said
            weights += [0.0] * len(asked) + [LOSS_WEIGHT[task]] * len(said)
        return ids, weights

    def batch(self, kind: str, n: int, width: int, height: int, turns: int = 3):
        """n pictures of one kind and size, right-padded: what Trainee.forward takes."""
        rows, cols = height // 16, width // 16
        samples = [self.draw(kind, width, height) for _ in range(n)]
        array = np.stack([np.asarray(s.image) for s in samples])
        patches = array.reshape(n, rows, 16, cols, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * cols, 768)
        pixels = torch.from_numpy(patches.astype(np.float32) / 127.5 - 1.0)
        labels = torch.from_numpy(
            np.stack(
                [
                    np.stack([getattr(s, name).reshape(-1) for s in samples])
                    for name in ("shape_labels", "character_labels", "slot_labels")
                ]
            )
        )
        talks = [self.conversation(s, rows * cols // 4, turns) for s in samples]
        length = max(len(ids) for ids, _ in talks)
        ids = torch.zeros(n, length, dtype=torch.long)
        weights = torch.zeros(n, length)
        for i, (tokens, weight) in enumerate(talks):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            weights[i, : len(weight)] = torch.tensor(weight)
        return pixels, (rows, cols), labels, ids, len(self.head), ids[:, 1:], weights[:, 1:]


# ---------------------------------------------------------------------------------------------------------- training


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), matrices of one shape stacked, in fp32.

    torch.optim.Muon iterates in bfloat16, matrix by matrix: as long as the rest of a step on a CPU without bfloat16
    units.
    """

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        shapes = sorted({tuple(p.shape) for p in matrices})
        groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [
                p for p in group["params"] if p.grad is not None
            ]  # the decoder has none while vision learns alone
            if not params:
                continue
            gradient = torch.stack([p.grad for p in params])
            state = self.state[group["params"][0]]
            buffer = state.setdefault("momentum", torch.zeros_like(gradient))
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalise(gradient.lerp(buffer, group["momentum"]))
            scale = group["lr"] * max(1.0, params[0].shape[0] / params[0].shape[1]) ** 0.5
            for p, direction in zip(params, update, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-scale)


def orthogonalise(x: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: quintic Newton-Schulz on [n, rows, cols]."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def optimizers(trainee: Trainee, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings, norms, biases, convolutions and the dense heads."""
    outside = ("embed_tokens", "position_embedding", "head.")
    matrices, rest = [], []
    for name, p in trainee.named_parameters():
        (matrices if p.ndim == 2 and not any(part in name for part in outside) else rest).append(p)
    return [Muon(matrices, muon_lr), torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train(
    trainee: Trainee,
    batcher: Batcher,
    minutes: float,
    start_at: float,
    save: Callable[[], None],
    log: Callable[[str], None],
) -> None:
    """From `start_at` of the schedule (0 to 1) to its end, in `minutes`."""
    muon, adam = groups = optimizers(trainee, MUON_LR, ADAM_LR)
    start, step, seen = time.perf_counter(), 0, 0
    smooth: dict[str, float] = {}
    while (at := start_at + (1 - start_at) * (time.perf_counter() - start) / (minutes * 60)) < 1:
        scale = min(1.0, (step + 1) / 60) * min(1.0, (1 - at) / (1 - DECAY_FROM))
        for group in muon.param_groups:
            group["lr"] = MUON_LR * scale
        adam.param_groups[0]["lr"] = ADAM_LR * scale
        width, height = 128, 128
        if at > MIXED_SIZES_FROM and step % 2:
            width, height = batcher.rng.choice(demo_data.SIDES), batcher.rng.choice(demo_data.SIDES)
        share = 128 * 128 / (width * height)
        # Two batches a step: conversations about shapes are twice as long as a reading, and padding is not free.
        for kind, at_128, weight in (("shapes", 32, 1.0), ("text", 20, 0.6)):
            n = max(4, round(at_128 * share))
            if at < VISION_ALONE_UNTIL:
                pixels, grid, labels, *_ = batcher.batch(kind, 2 * n, width, height)
                loss = dense = trainee.dense_loss(trainee.vision(pixels, grid), labels)
            else:
                text, dense = trainee(*batcher.batch(kind, n, width, height))
                loss = text + 0.3 * max(0.0, 1 - at / 0.8) * dense
                smooth[kind] = 0.98 * smooth.get(kind, text.item()) + 0.02 * text.item()
            (weight * loss).backward()
            smooth[f"{kind} dense"] = 0.98 * smooth.get(f"{kind} dense", dense.item()) + 0.02 * dense.item()
            seen += n
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer in groups:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            losses = "  ".join(f"{name} {value:.4f}" for name, value in smooth.items())
            log(f"{at:6.1%}  step {step}  images {seen}  lr ×{scale:.3f}  {losses}")
        if step % 500 == 0:
            save()
    save()


@torch.no_grad()
def accuracy(trainee: Trainee, tokenizer: Tokenizer, seed: int, per_task: int) -> dict[str, float]:
    """Greedy exact-match per task, in torch; the runtime's own figure comes from the exported bundle."""
    right = dict.fromkeys(demo_data.TASKS, 0)
    batcher = Batcher(tokenizer, 0)
    eos = tokenizer.token_to_id("<|im_end|>")
    trainee.eval()
    for image, questions in demo_data.evaluation_questions(seed, per_task):
        array = np.asarray(image.convert("RGB"))
        rows, cols = array.shape[0] // 16, array.shape[1] // 16
        patches = array.reshape(1, rows, 16, cols, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1, rows * cols, 768)
        features = trainee.vision(torch.from_numpy(patches.astype(np.float32) / 127.5 - 1.0), (rows, cols))
        image_embeds = trainee.model.model.multi_modal_projector(features.reshape(1, rows, cols, -1)).flatten(1, 2)
        language = trainee.model.model.language_model
        for task, question, answer in questions:
            tail = batcher.encode("<|image_end|>" + question + "<|im_end|>\n<|im_start|>assistant\n")
            embeds = torch.cat(
                [
                    language.embed_tokens(torch.tensor([batcher.head])),
                    image_embeds,
                    language.embed_tokens(torch.tensor([tail])),
                ],
                1,
            )
            said: list[int] = []
            while len(said) < 40:
                token = int(
                    trainee.model.lm_head(
                        language(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
                    ).argmax()
                )
                if token == eos:
                    break
                said.append(token)
                embeds = torch.cat([embeds, language.embed_tokens(torch.tensor([[token]]))], 1)
            right[task] += tokenizer.decode(said) == answer
    trainee.train()
    return {task: count / per_task for task, count in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument(
        "--start-at", type=float, default=0, metavar="FRACTION", help="go on from the saved state, here in the schedule"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    faster_short_conv(model)
    trainee = Trainee(model)
    state = options.folder.with_suffix(".state.pt")
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    if options.start_at:
        trainee.load_state_dict(torch.load(state))
    train(
        trainee,
        Batcher(tokenizer, options.seed),
        options.minutes,
        options.start_at,
        save=lambda: (save_checkpoint(model, tokenizer, options.folder), torch.save(trainee.state_dict(), state)),
        log=lambda line: print(line, flush=True),
    )
    print(json.dumps(accuracy(trainee, tokenizer, seed=99, per_task=100)))


if __name__ == "__main__":
    main()
