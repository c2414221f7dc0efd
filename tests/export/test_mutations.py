"""Files of a release with one thing wrong: export says so, or the bundle answers as transformers does. Nothing else may
happen.

A key is dropped, nulled, retyped, or moved to where another release writes it; a tensor is dropped, doubled, renamed,
turned, made NaN.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
reference = pytest.importorskip("reference")
pytest.importorskip("onnx_ir")
if not reference.TRANSFORMERS_5:
    pytest.skip(
        "transformers 4.57 knows neither TokenizersBackend nor projector_use_layernorm", allow_module_level=True
    )

import make_random_checkpoint  # noqa: E402
from lfm_export.checkpoint.checkpoint import Checkpoint  # noqa: E402
from lfm_export.export import export  # noqa: E402
from lfm_runtime import EdgeError, Message, Model  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoProcessor, AutoTokenizer, Lfm2VlForConditionalGeneration, Lfm2VlProcessor  # noqa: E402

pytestmark = pytest.mark.transformers5

VOCABULARY = 896
QUESTION = "What is in this image?"
SMALL, LARGE = (96, 64), (1100, 900)
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
VALUES = ("x", "\ud800", 3, 1.5, True, False, [], {}, -1, 0, 10**9, None, "", [1, 2], {"a": 1}, 1e-9)
TILING = (
    "max_image_tokens",
    "min_image_tokens",
    "do_image_splitting",
    "min_tiles",
    "max_tiles",
    "tile_size",
    "use_thumbnail",
    "max_pixels_tolerance",
    "downsample_factor",
    "encoder_patch_size",
)
PIXELS = ("image_mean", "image_std", "resample", "do_normalize", "do_rescale", "rescale_factor")
IMAGE_KEYS = (
    "max_image_tokens",
    "min_image_tokens",
    "do_image_splitting",
    "max_tiles",
    "tile_size",
    "use_thumbnail",
    "resample",
    "image_mean",
)


@functools.cache
def base(like: str) -> Path:
    """A tiny checkpoint in a release's spelling, with a small vocabulary."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="lfm-edge-mutations-"))
    small = make_random_checkpoint.config("tiny", like)
    small["text_config"]["vocab_size"] = VOCABULARY
    original, make_random_checkpoint.config = make_random_checkpoint.config, lambda *_: copy.deepcopy(small)
    try:
        make_random_checkpoint.write(folder, "tiny", like, "demo")
    finally:
        make_random_checkpoint.config = original
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")  # float32, so that both sides compute with the same weights
    return folder


# ---------------------------------------------------------------------------------------------------------- mutations


def paths_of(value, at=()):
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from paths_of(value[key], (*at, key))


def change_json(folder: Path, rng: random.Random) -> str:
    name = rng.choice(JSON_FILES)
    raw = json.loads((folder / name).read_text())
    path = rng.choice([p for p in paths_of(raw) if p])
    parent = functools.reduce(lambda at, key: at[key], path[:-1], raw)
    how = rng.choice(("drop", "null", "retype", "retype", "move"))
    before = parent[path[-1]]
    if how == "drop":
        del parent[path[-1]]
    elif how == "null":
        parent[path[-1]] = None
    elif how == "retype":
        parent[path[-1]] = rng.choice(VALUES)
    else:
        return move_key(folder, rng)
    (folder / name).write_text(json.dumps(raw))
    return f"{name} {'.'.join(path)} {how} ({json.dumps(before)[:40]} → {json.dumps(parent.get(path[-1]))})"


def move_key(folder: Path, rng: random.Random) -> str:
    """Move one key to where another release has it; returns what was done."""
    files = {name: json.loads((folder / name).read_text()) for name in JSON_FILES}
    config, generation = files["config.json"], files["generation_config.json"]
    text = config["text_config"]
    moves = [
        (generation, "eos_token_id", text),
        (generation, "eos_token_id", config),
        (text, "eos_token_id", config),
        (text, "rope_theta", text.setdefault("rope_parameters", {})),
        (text["rope_parameters"], "rope_theta", text),
        (config, "image_token_index", config),
        (text, "tie_word_embeddings", config),
    ]
    processor = files["processor_config.json"].get("image_processor")
    for key in IMAGE_KEYS:
        moves += [
            (files["preprocessor_config.json"], key, files["processor_config.json"]),
            (processor or {}, key, files["processor_config.json"]),
        ]
    source, key, target = rng.choice([(s, k, t) for s, k, t in moves if k in s])
    new = {"image_token_index": "image_token_id"}.get(key, key)
    target[new] = source.pop(key)
    if text.get("rope_parameters") == {}:
        del text["rope_parameters"]
    for name, raw in files.items():
        (folder / name).write_text(json.dumps(raw))
    return f"move {key}"


def change_tensor(folder: Path, rng: random.Random) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = rng.choice(sorted(tensors))
    how = rng.choice(("drop", "double", "rename", "turn", "nan", "cut", "head", "vision head", "norm", "prefix"))
    tensor = tensors[name]
    if how == "drop":
        del tensors[name]
    elif how == "double":
        tensors[name.replace("vision_model.", "") if "vision_model." in name else f"model.{name}"] = tensor.clone()
    elif how == "rename":
        tensors[f"{name}_" if rng.random() < 0.5 else name.replace(".layers.1", ".layers.7")] = tensors.pop(name)
    elif how == "turn":
        tensors[name] = tensor.transpose(0, -1).contiguous()
    elif how == "nan":
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[rng.randrange(tensor.numel())] = float(rng.choice(("nan", "inf")))
    elif how == "cut":
        tensors[name] = tensor[: max(1, len(tensor) // 2)].clone()
    elif how == "head":
        table = tensors["model.language_model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table.clone() if rng.random() < 0.3 else table.flip(0).contiguous()
    elif how == "vision head":
        tensors["model.vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 48)
    elif how == "norm":
        place = "model.multi_modal_projector.layer_norm"
        if f"{place}.weight" in tensors:
            del tensors[f"{place}.weight"], tensors[f"{place}.bias"]
        else:
            tensors[f"{place}.weight"], tensors[f"{place}.bias"] = (
                torch.linspace(0.5, 1.5, 192),
                torch.linspace(-0.5, 0.5, 192),
            )
    else:
        wanted = rng.choice(("_orig_mod.", "base_model.model.", "module."))
        tensors = {wanted + n: t for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"tensor {name} {how}"


def change_text(folder: Path, rng: random.Random) -> str:
    """A file that is no JSON object, or no JSON; a tokenizer.json with a part exchanged."""
    if rng.random() < 0.4:
        name = rng.choice((*JSON_FILES, "tokenizer.json", "chat_template.jinja"))
        content = rng.choice(
            ("", "{", "[]", "null", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "\udcff")
        )
        (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        return f"{name} is {content[:20]!r}"
    raw = json.loads((folder / "tokenizer.json").read_text())
    part = rng.choice(("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"))
    if part == "added_tokens" and rng.random() < 0.7:
        token = rng.choice(raw[part])
        key = rng.choice(sorted(token))
        token[key] = rng.choice((*VALUES, not token[key] if isinstance(token[key], bool) else 5))
        said = f"{token.get('content')} {key}"
    elif part == "model":
        key = rng.choice(sorted(raw["model"]))
        raw["model"][key] = rng.choice(VALUES)
        said = key
    elif part == "decoder" and rng.random() < 0.5:
        raw[part] = {"type": "Sequence", "decoders": [raw[part]]}
        said = "in a Sequence"
    else:
        raw[part] = rng.choice(VALUES)
        said = "exchanged"
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return f"tokenizer.json {part} {said}"


def mutate(folder: Path, rng: random.Random) -> str:
    return rng.choices((change_json, change_tensor, change_text), (6, 3, 1))[0](folder, rng)


# ---------------------------------------------------------------------------------------------------------- reference

_seen: dict[str, object] = {}


def once(folder: Path, names: list[str], make):
    """Return `make(folder)` or the exception that it raised, computed once for the same files."""
    digest = hashlib.sha256(repr(make.__name__).encode())
    for name in names:
        if (folder / name).exists():
            digest.update(name.encode() + (folder / name).read_bytes())
    if digest.hexdigest() not in _seen:
        if len(_seen) > 50:
            _seen.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _seen[digest.hexdigest()] = make(folder)
        except Exception as e:  # whatever transformers raises: it has no answer
            _seen[digest.hexdigest()] = e
    return _seen[digest.hexdigest()]


def reference_model(folder: Path):
    """(model, end tokens); raises where transformers has no answer: weights that it would make up, or numbers that are
    none.
    """
    model, info = Lfm2VlForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError("newly initialised")
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise ValueError("not finite")
    eos = model.generation_config.eos_token_id
    return model.eval(), eos if isinstance(eos, list) or eos is None else [eos]


def reference_inputs(folder: Path):
    """What the processor makes of one question about a small and about a large image."""
    if '"auto_map"' in (folder / "processor_config.json").read_text():
        processor = remote_processor(folder)
    else:
        processor = AutoProcessor.from_pretrained(folder)
        assert isinstance(processor, Lfm2VlProcessor), "another processor"
    found = []
    for size in (SMALL, LARGE):
        content = [{"type": "image", "image": picture(size)}, {"type": "text", "text": QUESTION}]
        found.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    return found


def remote_processor(folder: Path) -> Lfm2VlProcessor:
    """As the 2025 releases' own code made it: tiling by processor_config.json, else config.json; pixels by
    preprocessor_config.json.
    """
    config, tiling, pixels = (
        json.loads((folder / f"{name}config.json").read_text()) for name in ("", "processor_", "preprocessor_")
    )
    known = {key: value for key, value in {**config, **tiling}.items() if key in TILING} | {
        key: pixels[key] for key in PIXELS if key in pixels
    }
    images = reference.image_processor_class()(**known)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Lfm2VlProcessor(images, tokenizer, chat_template=(folder / "chat_template.jinja").read_text())


def picture(size: tuple[int, int]) -> Image.Image:
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    return Image.fromarray(np.stack([x * 2 % 256, y * 3 % 256, (x + y) % 256], axis=-1).astype(np.uint8))


def differences(folder: Path, bundle: Path) -> list[str]:
    """What the bundle answers otherwise than transformers does on the same files."""
    model = Model.load(bundle, variant="fp32", threads=1)
    inputs = once(folder, ["tokenizer.json", "chat_template.jinja", *JSON_FILES[1:], "config.json"], reference_inputs)
    found = []
    if not isinstance(inputs, Exception):
        for size, wanted in zip((SMALL, LARGE), inputs, strict=True):
            planned = model.open(picture(size))
            ids = model.prompts.render([Message.user(QUESTION, 1)], [planned.layout]).ids
            if ids != wanted["input_ids"][0].tolist():
                found.append(
                    f"ids of {size}: {ids[:8]}… {len(ids)} instead of {wanted['input_ids'][0].tolist()[:8]}… {wanted['input_ids'].shape[1]}"
                )
    given = once(folder, ["config.json", "generation_config.json", "model.safetensors"], reference_model)
    if isinstance(given, Exception):
        return found
    torch_model, eos = given
    if eos and sorted(eos) != sorted(model.bundle.eos):  # [] would never end
        found.append(f"end tokens {model.bundle.eos} instead of {eos}")
    if not Checkpoint(folder).notes:  # where tensors overrule a flag, transformers drops tensors or makes some up
        planned = model.open(picture(SMALL))
        job = model.prepare_answer([Message.user(QUESTION, 1)], [planned], temperature=0)
        features = model.encode([planned])
        pixels, grids, mask = reference_views(planned)
        wanted_features = reference.image_features(torch_model, pixels, grids, mask)
        if not np.allclose(features, wanted_features, atol=2e-3 * max(1, np.abs(wanted_features).max())):
            found.append(f"image features, off by {np.abs(features - wanted_features).max():.3g}")
        from lfm_runtime.decode.context import Context

        logits = model.read(job, Context(model.decoder))
        with torch.no_grad():
            embeds = torch_model.get_input_embeddings()(torch.tensor([job.prompt.ids]))
            at = torch.tensor(job.prompt.ids) == model.prompts.image_id
            embeds[0, at] = torch.tensor(wanted_features)
            wanted = torch_model(inputs_embeds=embeds).logits[0, -1].numpy()
        if not np.allclose(logits, wanted, atol=2e-3 * max(1, np.abs(wanted).max())):
            found.append(f"logits, off by {np.abs(logits - wanted).max():.3g}")
    return found


def reference_views(planned):
    from lfm_runtime.images.pixels import cut_views

    (view,) = planned.layout.views
    (patches,) = cut_views(planned.image, planned.layout, planned.settings)
    return patches[None], np.array([[view.rows, view.columns]], np.int64), np.ones((1, len(patches)), np.int64)


def judge(seed: int, like: str, work: Path) -> tuple[str, str | None]:
    """Return (what was changed and what export said, what is wrong or None)."""
    rng = random.Random(seed)
    folder = Path(shutil.copytree(base(like), work / f"{seed}"))
    what = mutate(folder, rng)
    bundle = work / f"{seed}-bundle"
    try:
        export(folder, bundle)
    except EdgeError as e:
        said = str(e)
        return f"{what}: {said}", None if said.strip() and "Traceback" not in said else "an empty message"
    except Exception as e:  # what the test is about: our errors are EdgeErrors
        return what, f"{type(e).__name__}: {e}"
    try:
        different = differences(folder, bundle)
    except EdgeError as e:
        different = [f"the bundle cannot be used: {e}"]
    shutil.rmtree(bundle)
    shutil.rmtree(folder)
    answers = [isinstance(v, Exception) for v in list(_seen.values())[-2:]]
    return f"{what}: exported{' (transformers fails)' * any(answers)}", "; ".join(different) or None


def run(seeds: range, work: Path, show: bool = False) -> None:
    wrong = []
    for seed in seeds:
        said, problem = judge(seed, ("lfm2.5", "2025")[seed % 2], work)
        if show:
            print(seed, said)
        if problem:
            wrong.append(f"seed {seed}: {said}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", range(4))
def test_two_hundred_mutations(part, tmp_path) -> None:
    run(range(50 * part, 50 * part + 50), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(18))
def test_two_thousand_mutations(part, tmp_path) -> None:
    run(range(200 + 100 * part, 300 + 100 * part), tmp_path)


@pytest.mark.parametrize("like", ["2025", "lfm2.5"])
def test_unchanged_files_answer_as_transformers_does(like, tmp_path) -> None:
    """The comparison can see: nothing differs, and a changed weight does."""
    export(base(like), tmp_path / "bundle")
    assert differences(base(like), tmp_path / "bundle") == []
    other = Path(shutil.copytree(base(like), tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.language_model.layers.1.feed_forward.w1.weight"] *= 1.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert any("logits" in said for said in differences(other, tmp_path / "bundle"))


if __name__ == "__main__":
    import tempfile

    first, last = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        run(range(first, last), Path(folder), show=True)
