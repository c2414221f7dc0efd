"""The Python API and the command line on the demo bundle: answers, reports, streaming, other people's folders, bad
input.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from lfm_runtime import (
    IMAGE,
    BundleError,
    Chat,
    Conversation,
    EdgeError,
    GraphContractError,
    ImageError,
    Message,
    Model,
    PromptError,
    SettingError,
)
from lfm_runtime.answer.reply import StopStrings
from lfm_runtime.commands.cli import main
from lfm_runtime.decode.states import ConcatenatedState, SharedState
from lfm_runtime.report import STAGES
from PIL import Image

EVAL = Path(__file__).resolve().parents[2] / "demo" / "eval"


@pytest.fixture(scope="module")
def drawing() -> Path:
    return EVAL / "images" / "0000.png"


# ------------------------------------------------------------------------------------------------------------ answers


def test_answer_and_report(demo_model, drawing) -> None:
    answer = demo_model.answer([drawing], "What is in this image?", temperature=0)
    pieces = list(answer)
    report = answer.report.as_dict()
    assert "".join(pieces) == report["text"]
    assert len(pieces) > 1
    assert report["finish_reason"] == "eos"
    assert set(report["timing_ms"]) == set(STAGES)
    assert all(value is not None and value > 0 for value in report["timing_ms"].values())
    assert report["timing_ms"]["ttft"] <= report["timing_ms"]["total"]
    parts = sum(report["timing_ms"][s] for s in ("image", "vision", "embed", "prefill"))
    assert parts <= report["timing_ms"]["ttft"]
    assert report["memory_mib"]["peak"] >= report["memory_mib"]["rss"] > 20
    assert report["image_tokens"] < report["prompt_tokens"]


def test_evaluation_set(demo_model) -> None:
    """The stored evaluation set: at least 400 questions in four tasks, mean accuracy at least 90 %, no task below 85 %."""
    lines = [json.loads(line) for line in (EVAL / "eval.jsonl").read_text().splitlines()]
    assert len(lines) >= 400
    tasks = sorted({line["task"] for line in lines})
    assert tasks == ["count", "describe", "read", "where"]
    right = {task: [] for task in tasks}
    for line in lines:
        right[line["task"]].append(demo_model.answer([EVAL / line["image"]], line["question"]).text() == line["answer"])
    accuracy = {task: np.mean(found) for task, found in right.items()}
    print(accuracy)
    assert np.mean(list(accuracy.values())) >= 0.90, accuracy
    assert min(accuracy.values()) >= 0.85, accuracy


def test_photo_is_tiled(demo_model, photo) -> None:
    seen = []
    answer = demo_model.answer([photo], "What is in this image?", max_new_tokens=4, progress=lambda *n: seen.append(n))
    answer.text()
    assert answer.report.tiles > 2
    assert seen[0] == (0, answer.report.tiles)
    assert seen[-1] == (answer.report.tiles, answer.report.tiles)


def test_several_images_and_none(demo_model, drawing) -> None:
    one = demo_model.answer([drawing], "How many shapes?", temperature=0)
    two = demo_model.answer(
        [drawing, np.asarray(Image.open(drawing).convert("RGB"))], "How many shapes?", temperature=0
    )
    none = demo_model.answer([], "How many shapes?", temperature=0, max_new_tokens=5)
    for answer in (one, two, none):
        answer.text()
    assert two.report.image_tokens == 2 * one.report.image_tokens
    assert none.report.image_tokens == none.report.tiles == 0
    assert none.report.timing_ms["vision"] is None


def test_what_transformers_users_try_first(demo_model, drawing) -> None:
    """Dicts as messages, places without images, things that are no image: each says what is wanted."""
    dicts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    for make in (lambda: demo_model.converse(dicts, [drawing]), lambda: Conversation(dicts)):
        with pytest.raises(PromptError, match=r"a message is a dict; give lfm_runtime\.Message"):
            make()
    place = [Message("user", (IMAGE, "x"))]
    for images, count in (([], 0), ([drawing, drawing], 2)):
        with pytest.raises(PromptError, match=f"have 1 places for images .* and {count} images are given"):
            demo_model.converse(place, images)
    for odd, says in (
        (None, "an image is a NoneType; give a path, a file"),
        (io.BytesIO(b""), r"image \(BytesIO\) is not a readable image"),
        (io.StringIO("x"), "an image is a file of text; open it as binary"),
    ):
        with pytest.raises(ImageError, match=says):
            demo_model.answer(odd, "x")
    with pytest.raises(ImageError, match="does not exist; download it first"):
        demo_model.answer("https://example.com/a.jpg", "x")


def test_finish_reasons(demo_model, drawing) -> None:
    question = "What is in this image?"
    whole = demo_model.answer([drawing], question).text()
    short = demo_model.answer([drawing], question, max_new_tokens=2)
    assert whole.startswith(short.text())
    assert (short.report.finish_reason, short.report.new_tokens) == ("length", 2)
    word = whole.split()[-1]
    stopped = demo_model.answer([drawing], question, stop=(word,))
    assert whole.startswith(stopped.text())
    assert word not in stopped.report.text
    assert stopped.report.finish_reason == "stop"


def test_an_answer_ends_at_the_context_limit(bundle_copy, drawing) -> None:
    """The answer ends at the context limit; a prompt beyond it is refused before any work."""
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["context_length"] = 80
    path.write_text(json.dumps(manifest))
    model = Model.load(bundle_copy, threads=1)
    answer = model.answer([drawing], "What is in this image?", ignore_eos=True)
    answer.text()
    assert answer.report.finish_reason == "context"
    assert answer.report.prompt_tokens + answer.report.new_tokens == 81  # the last token is said, not fed
    with pytest.raises(PromptError, match="together may have at most 80"):
        model.answer([drawing], "word " * 100)


def test_several_turns(demo_model, drawing) -> None:
    """A chat gives the same answers as the whole conversation computed again, and reads its own tokens alone."""
    chat = Chat(demo_model)
    chat.ask("How many shapes?", [drawing]).text()
    kept = chat.ask("What is in this image?")
    again = demo_model.converse([*chat.messages[:2], Message.user("What is in this image?")], [drawing])
    assert kept.text() == again.text()
    assert kept.report.timing_ms["vision"] is None
    assert again.report.timing_ms["vision"]
    assert 0 < kept.report.prompt_tokens - kept.report.cached_tokens < 20 < again.report.prompt_tokens


def test_early_close(demo_model, drawing) -> None:
    """Leaving an answer half-way and asking again gives the same text."""
    first = demo_model.answer([drawing], "What is in this image?").text()
    pieces = iter(demo_model.answer([drawing], "What is in this image?"))
    next(pieces)
    pieces.close()
    assert demo_model.answer([drawing], "What is in this image?").text() == first


def test_threads_of_one_process(demo_bundle, drawing) -> None:
    """Two models at once in two threads: no state is shared by accident."""
    models = [Model.load(demo_bundle, threads=1) for _ in range(2)]
    wanted = models[0].answer([drawing], "What is in this image?").text()
    found: list[str] = []
    workers = [
        threading.Thread(target=lambda m=m: found.append(m.answer([drawing], "What is in this image?").text()))
        for m in models
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [wanted, wanted]


def test_both_forms_of_state_agree(demo_model) -> None:
    """Shared buffers and plain past/present give the same logits, step by step and in chunks."""
    decoder = demo_model.decoder
    embeds = decoder.embed([int(i) for i in np.random.default_rng(0).integers(10, 400, 40)])
    shared, plain = SharedState(decoder, 64), ConcatenatedState(decoder, 64)
    at = 0
    for n in (20, 1, 1, 5, 1, 12):
        a = shared.step(embeds[:, at : at + n]).copy()
        np.testing.assert_allclose(a, plain.step(embeds[:, at : at + n]), atol=1e-4)
        at += n
    assert shared.length == plain.length == 40


@pytest.mark.parametrize(
    ("pieces", "stops", "wanted"),
    [
        (["abc", "def"], ("cd",), "ab"),
        (["a", "b", "c"], ("x",), "abc"),
        (["aab", "b"], ("abb",), "a"),
        (["xy", "x"], ("xyz",), "xyx"),
        (["one END two"], ("END", "one E"), ""),
        (["a"], (), "a"),
    ],
)
def test_stop_strings(pieces, stops, wanted) -> None:
    held = StopStrings(stops)
    assert "".join(held.pass_on(p) for p in pieces) + held.rest() == wanted


# ----------------------------------------------------------------------------------------------- other people's folders


@pytest.mark.parametrize("names", ["hub", "older"])
def test_a_hub_folder_runs_without_manifest(demo_bundle, demo_model, drawing, tmp_path, names) -> None:
    """Only the hub's files: no manifest, no prompt.json; also with the names older repositories use, beside
    config.json.
    """
    rename = (
        {"vision_encoder.onnx": "embed_images.onnx", "decoder_model_merged.onnx": "decoder.onnx"}
        if names == "older"
        else {}
    )
    target = tmp_path / "onnx" if names == "hub" else tmp_path
    target.mkdir(exist_ok=True)
    for path in (demo_bundle / "onnx").iterdir():
        shutil.copy(path, target / rename.get(path.name, path.name))
    for path in demo_bundle.iterdir():
        if path.is_file() and path.name not in ("manifest.json", "prompt.json"):
            shutil.copy(path, tmp_path / path.name)
    model = Model.load(tmp_path, threads=1)
    for question in ("What is in this image?", "How many shapes?", "naïve 日本?"):
        wanted, got = demo_model.answer([drawing], question), model.answer([drawing], question)
        assert got.text() == wanted.text()
        assert got.report.prompt_tokens == wanted.report.prompt_tokens


def test_hub_folder_without_a_tokenizer(demo_bundle, tmp_path) -> None:
    shutil.copytree(demo_bundle, tmp_path / "b")
    for name in ("manifest.json", "prompt.json", "tokenizer.json"):
        (tmp_path / "b" / name).unlink()
    with pytest.raises(PromptError, match=r"tokenizer\.json is missing"):
        Model.load(tmp_path / "b")


def test_model_card_snippet(demo_bundle, demo_model, drawing) -> None:
    """The contract as model cards use it: three sessions, zeros for the caches, past_conv of width 3, logits[:, -1]."""
    reference = pytest.importorskip("reference")
    import onnxruntime as ort
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_bundle)
    processor = reference.demo_processor()
    vision, embed, decoder = (
        ort.InferenceSession(str(demo_bundle / "onnx" / f"{stem}.onnx"))
        for stem in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    text = config.text_config
    cache = {}
    for i, kind in enumerate(text.layer_types):
        if kind == "conv":
            cache[f"past_conv.{i}"] = np.zeros((1, text.hidden_size, 3), np.float32)
        else:
            shape = (1, text.num_key_value_heads, 0, text.hidden_size // text.num_attention_heads)
            cache[f"past_key_values.{i}.key"] = np.zeros(shape, np.float32)
            cache[f"past_key_values.{i}.value"] = np.zeros(shape, np.float32)

    question = "What is in this image?"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[[Image.open(drawing).convert("RGB")]], text=[prompt], return_tensors="pt")
    ids = inputs["input_ids"].numpy()
    features = vision.run(
        ["image_features"],
        {
            "pixel_values": inputs["pixel_values"].numpy(),
            "pixel_attention_mask": inputs["pixel_attention_mask"].numpy().astype(np.int64),
            "spatial_shapes": inputs["spatial_shapes"].numpy(),
        },
    )[0]
    mask = np.ones_like(ids)
    embeds = embed.run(None, {"input_ids": ids})[0]
    embeds[ids == config.image_token_id] = features
    said = []
    for _ in range(40):
        logits, *present = decoder.run(None, {"inputs_embeds": embeds, "attention_mask": mask, **cache})
        token = logits[:, -1].argmax(-1, keepdims=True)
        said.append(int(token[0, 0]))
        if said[-1] == text.eos_token_id:
            break
        cache = dict(zip(cache, present, strict=False))  # by position, as the card does
        mask = np.concatenate([mask, np.ones_like(token)], -1)
        embeds = embed.run(None, {"input_ids": token})[0]
    assert (
        processor.tokenizer.decode(said, skip_special_tokens=True)
        == demo_model.answer([drawing], question, temperature=0).text()
    )


# -------------------------------------------------------------------------------------------------------- command line


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(w) for w in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_run_prints_text_then_table(demo_bundle, drawing, capsys) -> None:
    code, out, err = run(capsys, "run", demo_bundle, drawing, "-p", "What is in this image?", "--threads", 1)
    assert code == 0
    assert len(out.strip().splitlines()) == 1
    for word in ("ttft", "vision", "per token", "tok/s", "MiB", "peak"):
        assert word in err


def test_run_json(demo_bundle, drawing, capsys) -> None:
    code, out, err = run(
        capsys, "run", demo_bundle, drawing, "-p", "How many shapes?", "--json", "--threads", 1, "--temperature", 0
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert set(report) == {
        "text",
        "finish_reason",
        "prompt_tokens",
        "cached_tokens",
        "image_tokens",
        "tiles",
        "encoded_tiles",
        "new_tokens",
        "speculative_tokens",
        "accepted_tokens",
        "timing_ms",
        "throughput",
        "memory_mib",
    }
    assert set(report["throughput"]) == {"prefill_tok_s", "decode_tok_s"}
    assert set(report["memory_mib"]) == {"rss", "rss_anon", "rss_file", "peak"}


def test_flags_arrive(demo_bundle, photo, capsys) -> None:
    """Each image flag changes the plan as it should."""

    def tiles(*flags) -> tuple[int, int]:
        _, out, _ = run(
            capsys, "run", demo_bundle, photo, "-p", "x", "--json", "--max-new-tokens", 1, "--threads", 1, *flags
        )
        report = json.loads(out)
        return report["tiles"], report["image_tokens"]

    views, tokens = tiles()
    assert tiles("--no-use-thumbnail")[0] == views - 1
    assert tiles("--no-do-image-splitting")[0] == 1
    assert tiles("--no-do-image-splitting", "--max-image-tokens", 16)[1] <= 16
    assert tiles("--max-tiles", 2)[0] == 3
    assert tiles("--min-image-tokens", 60)[1] >= tokens - 64 + 60 - 16


def test_chat_answers_each_line(demo_bundle, drawing, capsys, monkeypatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("How many shapes?\nWhat is in this image?\n\n"))
    code, out, err = run(capsys, "chat", demo_bundle, drawing, "--threads", 1)
    assert code == 0
    assert len(out.strip()) > 2
    assert err.count("generated, first token after") == 2


BAD = {
    "no bundle": (["run", "nowhere", "-p", "x"], "does not exist"),
    "not a bundle": (["run", "{tmp}", "-p", "x"], "it has no manifest.json and no config.json"),
    "no image": (["run", "{bundle}", "nope.png", "-p", "x"], "does not exist"),
    "not an image": (["run", "{bundle}", "{bundle}/manifest.json", "-p", "x"], "not a readable image"),
    "variant": (["run", "{bundle}", "-p", "x", "--variant", "int4"], "no variant 'int4'; it has fp32"),
    "useless image flag": (["run", "{bundle}", "-p", "x", "--max-tiles", "3"], "no effect without an image"),
    "useless tile flag": (
        ["run", "{bundle}", "{image}", "-p", "x", "--no-do-image-splitting", "--max-tiles", "3"],
        "no effect while",
    ),
    "useless seed": (
        ["run", "{bundle}", "{image}", "-p", "x", "--temperature", "0", "--seed", "1"],
        "no effect at temperature 0",
    ),
    "impossible": (["run", "{bundle}", "{image}", "-p", "x", "--min-p", "7"], "min_p 7.0 is impossible"),
    "impossible tiles": (["run", "{bundle}", "{image}", "-p", "x", "--max-tiles", "0"], "max_tiles 0"),
    "threads": (["run", "{bundle}", "{image}", "-p", "x", "--threads", "-1"], "threads -1"),
    "image in text": (["run", "{bundle}", "{image}", "-p", "<image>"], "2 places for 1 images"),
    "image in text alone": (["run", "{bundle}", "-p", "<image>"], "1 places for 0 images"),
    "long prompt": (
        ["run", "{bundle}", "{image}", "-p", "word " * 5000],
        "prompt and answer together may have at most",
    ),
    "negative seed": (
        ["run", "{bundle}", "{image}", "-p", "x", "--temperature", "1", "--seed", "-1"],
        "seed -1 is impossible",
    ),
    "useless limit": (["run", "{bundle}", "-p", "x", "--max-megapixels", "5"], "no effect without an image"),
    "bomb": (["run", "{bundle}", "{image}", "-p", "x", "--max-megapixels", "0.001"], "megapixels"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "_"))
def test_bad_input_is_one_line_and_exit_code_2(case, demo_bundle, drawing, tmp_path, capsys) -> None:
    """One line on stderr, exit code 2, nothing on stdout, nothing left behind."""
    words, says = BAD[case]
    before = sorted(p.name for p in demo_bundle.rglob("*"))
    code, out, err = run(capsys, *(w.format(bundle=demo_bundle, image=drawing, tmp=tmp_path) for w in words))
    assert (code, out) == (2, "")
    assert err.startswith("lfm-edge: ")
    assert err.count("\n") == 1
    assert says in err
    assert sorted(p.name for p in demo_bundle.rglob("*")) == before


def damage(bundle: Path, what: str) -> None:
    data = bundle / "onnx" / "decoder_model_merged.onnx_data"
    graph = bundle / "onnx" / "vision_encoder.onnx"
    manifest = bundle / "manifest.json"
    if what == "graph":
        graph.write_bytes(graph.read_bytes()[:-100])
    elif what == "graph byte":
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 1
        graph.write_bytes(content)
    elif what == "data":
        os.truncate(data, data.stat().st_size // 2)
    elif what == "data byte":
        content = bytearray(data.read_bytes())
        content[1000] ^= 1
        data.write_bytes(content)
    elif what == "missing":
        data.unlink()
    elif what == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    elif what == "manifest":
        manifest.write_text(manifest.read_text()[:200])
    elif what == "outside":
        raw = json.loads(manifest.read_text())
        raw["variants"]["fp32"]["vision_encoder"] = "../../etc/passwd"
        manifest.write_text(json.dumps(raw))
    elif what == "prompt":
        (bundle / "prompt.json").write_text("{}")
        raw = json.loads(manifest.read_text())
        raw["files"].pop("prompt.json")
        manifest.write_text(json.dumps(raw))


MANIFEST_DAMAGE = {
    "variants list": lambda m: m.update(variants={"fp32": ["x"]}),
    "file int": lambda m: m["variants"]["fp32"].update(embed_tokens=7),
    "no context": lambda m: m["model"].pop("context_length"),
    "context text": lambda m: m["model"].update(context_length="many"),
    "entry int": lambda m: m["files"].update(x=7),
    "entry empty": lambda m: m["files"].update(x={}),
    "schema text": lambda m: m.update(schema="one"),
    "no files": lambda m: m.pop("files"),
    "absolute": lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
}


@pytest.mark.parametrize("case", MANIFEST_DAMAGE)
def test_damaged_manifest(case, bundle_copy, capsys) -> None:
    """Valid JSON with wrong content: still one line and exit code 2."""
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    MANIFEST_DAMAGE[case](manifest)
    path.write_text(json.dumps(manifest))
    code, out, err = run(capsys, "run", bundle_copy, "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "manifest.json" in err


OTHER_DAMAGE = {
    "generation_config.json": ['{"eos_token_id": "x"}', "[]", '{"temperature": "hot"}'],
    "config.json": ["[]", '{"text_config": 7}'],
    "preprocessor_config.json": [
        "[]",
        '{"encoder_patch_size": 0}',
        '{"tile_size": "big"}',
        '{"do_normalize": false}',
        '{"rescale_factor": 1}',
    ],
    "prompt.json": ["{}", "[]", '{"schema": 1, "vocabulary": [], "chat": {}, "image_tokens": {}}'],
}


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, cs in OTHER_DAMAGE.items() for c in cs])
def test_damaged_settings(name, content, bundle_copy, capsys) -> None:
    (bundle_copy / name).write_text(content)
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["files"].pop(name)
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = run(capsys, "run", bundle_copy, "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert name in err or "encoder_patch_size" in err or "image setting" in err


def test_verify_finds_what_size_does_not(bundle_copy, monkeypatch) -> None:
    """A large file with a flipped byte loads; with verify it does not."""
    import lfm_runtime.bundle

    monkeypatch.setattr(lfm_runtime.bundle, "HASHED_AT_LOAD", 1000)
    damage(bundle_copy, "data byte")
    Model.load(bundle_copy)
    with pytest.raises(BundleError, match="SHA-256"):
        Model.load(bundle_copy, verify=True)


def test_missing_extra(capsys, monkeypatch, tmp_path) -> None:
    """Without the export extra, `export` says what to install."""
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    for name in [n for n in sys.modules if n.startswith("lfm_export") and n != "lfm_export.cli"]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = run(capsys, "export", tmp_path, "-o", tmp_path / "b")
    assert code == 2
    assert "needs the Python package" in err and " -m pip install " in err


def test_flags_before_images(demo_bundle, drawing, capsys) -> None:
    code, out, _ = run(capsys, "run", demo_bundle, "-p", "How many shapes?", drawing, "--json", "--threads", 1)
    assert code == 0
    assert json.loads(out)["tiles"] == 1


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("graph", "bytes, the manifest says"),
        ("graph byte", "SHA-256"),
        ("data", "bytes, the manifest says"),
        ("data byte", "SHA-256"),
        ("missing", "is missing"),
        ("newer", "update lfm-edge"),
        ("manifest", "damaged"),
        ("outside", "outside the bundle"),
        ("prompt", "prompt.json"),
    ],
)
def test_damaged_bundle(what, says, bundle_copy) -> None:
    damage(bundle_copy, what)
    with pytest.raises(BundleError, match=says):
        Model.load(bundle_copy)


def test_damaged_hub_folder(bundle_copy) -> None:
    """Without a manifest there are no hashes; what the file itself tells becomes one line."""
    (bundle_copy / "manifest.json").unlink()
    damage(bundle_copy, "graph")
    with pytest.raises(BundleError, match="is not an ONNX graph, or is cut off"):
        Model.load(bundle_copy)


def test_graph_that_fails_at_run_time(demo_bundle, drawing, capsys, monkeypatch) -> None:
    """An error of onnxruntime in the middle of an answer is one line, too."""
    from lfm_runtime.decode.decoder import Decoder

    embed = Decoder.embed
    monkeypatch.setattr(Decoder, "embed", lambda self, ids: embed(self, [10**6 for _ in ids]))
    code, out, err = run(capsys, "run", demo_bundle, drawing, "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "does not work with onnxruntime" in err


def test_wrong_graph(bundle_copy) -> None:
    """A decoder in the place of the vision encoder is named as such."""
    (bundle_copy / "manifest.json").unlink()
    shutil.copy(bundle_copy / "onnx" / "embed_tokens.onnx", bundle_copy / "onnx" / "vision_encoder.onnx")
    with pytest.raises(GraphContractError, match="lacks"):
        Model.load(bundle_copy)


def test_errors_are_standard_errors() -> None:
    for error in (BundleError, GraphContractError, ImageError, PromptError, SettingError):
        assert issubclass(error, EdgeError)
        assert issubclass(error, ValueError)


# ---------------------------------------------------------------------------------------------------------- the promise

FORBIDDEN = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "tokenizers",
    "jinja2",
    "lfm_export",
    "lfm_quantize",
    "requests",
    "huggingface_hub",
}


def loaded_by(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", code + "\nimport sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(out.splitlines()[-1].split())


def test_runtime_stays_light() -> None:
    assert not FORBIDDEN & loaded_by(
        "import lfm_runtime, lfm_runtime.commands.cli, lfm_runtime.commands.run, lfm_runtime.commands.chat, lfm_profiles"
    )


def test_command_line_stays_light(demo_bundle, drawing) -> None:
    """A whole `run`, to the end of its answer, imports no forbidden package."""
    code = f"from lfm_runtime.commands.cli import main\nassert main(['run', {str(demo_bundle)!r}, {str(drawing)!r}, '-p', 'x', '--json']) == 0"
    assert not FORBIDDEN & loaded_by(code)


def test_help_is_instant() -> None:
    """--help loads no onnxruntime and no numpy."""
    code = "from lfm_runtime.commands.cli import main\nimport contextlib\nwith contextlib.suppress(SystemExit):\n    main(['run', '--help'])"
    assert not {"onnxruntime", "numpy", "PIL"} & loaded_by(code)


@pytest.mark.parametrize(("given", "wanted"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_the_user_says_otherwise(given, wanted) -> None:
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if given:
        env["ORT_DISABLE_TELEMETRY"] = given
    code = """
import os, sys
class Watch:  # sees the variable at the moment onnxruntime is first asked for
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
from lfm_runtime import Model
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.split() == [wanted]
