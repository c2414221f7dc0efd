"""Two audits beside each other: worse, better, within noise, too few samples; and files that are no audits."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from edits import figure, images_of, resampled, sealed
from lfm_audit.compare import changes, differences
from lfm_audit.reading import AuditError, read_audit
from lfm_audit.result import Audit, Verdict
from lfm_runtime.commands.cli import main
from lfm_runtime.formats.typed import read_as


@pytest.fixture
def written(made) -> Path:
    return made


def made_slower(result: dict, factor: float) -> dict:
    for image in images_of(result):
        resampled(image, lambda samples: [x * factor for x in samples])
    return result


def many(result: dict) -> dict:
    """Ten samples close together: what an audit on a quiet machine has."""
    for found in result["variants"].values():
        figures = [found["starts"]["warm"]["ready_ms"], found["starts"]["cold"]["ready_ms"]]
        figures += [found["memory"][name] for name in ("peak_mib", "anonymous_mib")]
        figures += [image["decode_tok_s"] for image in found["images"].values()]
        for of in figures:
            of.update(figure([of["median"] * (1 + 0.001 * n) for n in range(10)]))
    for image in images_of(result):
        resampled(image, lambda samples: [samples[0] * (1 + 0.001 * n) for n in range(10)])
    return result


def test_compare(written, tmp_path, capsys) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(sealed(many(json.loads(written.read_text()))))
    for factor, code, word in ((1.0, 0, ""), (1.04, 0, ""), (1.2, 1, "WORSE"), (0.5, 0, "-50.0%")):
        b.write_text(sealed(made_slower(json.loads(a.read_text()), factor)))
        assert main(["compare", str(a), str(b)]) == code
        assert word in capsys.readouterr().out
    assert main(["compare", str(a), str(b), "--fail-over", "200%"]) == 0
    b.write_text(sealed(made_slower(json.loads(a.read_text()), 1.2)))
    assert main(["compare", str(a), str(b), "--fail-over", "25"]) == 0
    noisy = json.loads(a.read_text())
    for image in noisy["variants"]["int4"]["images"].values():
        resampled(image, lambda samples: [x * (1 if n % 2 else 3) for n, x in enumerate(samples)])
    b.write_text(sealed(noisy))
    assert main(["compare", str(a), str(b)]) == 3, "a spread that wide is not valid"
    assert "within noise" in capsys.readouterr().out
    few = made_slower(json.loads(a.read_text()), 1.5)
    for image in images_of(few):
        resampled(image, lambda samples: samples[:4])
    b.write_text(sealed(few))
    assert main(["compare", str(a), str(b)]) == 3, "four samples do not tell, and that is not well"
    assert "too few samples to tell" in capsys.readouterr().out
    invalid = made_slower(json.loads(a.read_text()), 1.2)
    invalid["machine"]["throttled_while_measured"] = True
    b.write_text(sealed(invalid))
    assert main(["compare", str(a), str(b)]) == 3, "before 1, as in lfm-edge audit"
    assert "throttled: " in capsys.readouterr().out


def test_verdicts_and_limits_are_judged_again(written, tmp_path) -> None:
    """What a file says of itself is not believed, but for what no figure shows."""
    raw = json.loads(written.read_text())
    path = tmp_path / "a.json"

    def read() -> Audit:
        path.write_text(sealed(raw))
        return read_audit(path)

    assert read().verdict == read_audit(written).verdict
    share = raw["machine"]["background_share"]
    raw["machine"]["background_share"] = figure([0.7] * share["n"])
    raw["verdict"] = {"valid": True, "reasons": []}
    assert not read().verdict.valid
    raw["machine"]["background_share"] = share
    raw["verdict"] = {"valid": False, "reasons": ["throttled", "the clock stood still or jumped: 1 s, 2 s"]}
    assert read().verdict == Verdict(valid=False, reasons=("the clock stood still or jumped: 1 s, 2 s",))
    raw["limits"] = [
        {"name": "ttft_ms", "limit": 1.0, "variant": "int4", "image": "small", "measured": 0.5, "holds": True}
    ]
    assert {limit.holds for limit in read().limits} == {False}


def test_audits_of_older_schemas_are_read(written, tmp_path) -> None:
    """1 had no digest, 2 did not tell what was changed of the image settings."""
    path = tmp_path / "a.json"
    old = {key: value for key, value in json.loads(written.read_text()).items() if key != "sha256"}
    for variant in old["variants"].values():
        assert variant.pop("changes") == []
    path.write_text(json.dumps({**old, "schema": 1}))
    assert read_audit(path).bundle == read_audit(written).bundle
    path.write_text(sealed({**old, "schema": 2}))
    assert {variant.changes for variant in read_audit(path).variants.values()} == {None}
    path.write_text(json.dumps({**old, "schema": 2}))
    with pytest.raises(AuditError, match="it has no sha256"):
        read_audit(path)


def test_every_figure_agrees_with_its_samples(written, tmp_path) -> None:
    path = tmp_path / "a.json"
    for at in (("starts", "warm", "open_ms"), ("memory", "pss_mib"), ("images", "small", "stages", "embed_ms")):
        raw = json.loads(written.read_text())
        of = raw["variants"]["int4"]
        for key in at:
            of = of[key]
        of["median"] *= 2
        path.write_text(sealed(raw))
        with pytest.raises(AuditError, match="does not agree with its samples"):
            read_audit(path)


def test_times_that_do_not_add_up_were_edited(written, tmp_path) -> None:
    path = tmp_path / "a.json"
    for name in ("ttft_ms", "total_ms"):
        for factor in (0.5, 2.0):
            raw = json.loads(written.read_text())
            for image in images_of(raw):
                image[name] = figure([x * factor for x in image[name]["samples"]])
            path.write_text(sealed(raw))
            with pytest.raises(AuditError, match="was edited: the stages of"):
                read_audit(path)


def test_differences(written) -> None:
    before, raw = read_audit(written), json.loads(written.read_text())
    assert differences(before, before) == []
    raw["software"]["onnxruntime"] = "1.20.0"
    raw["profile"]["settings"]["threads"] = 7
    raw["variants"]["int4"]["images"]["small"]["text_sha256"] = ["x"]
    raw["variants"]["int4"].update(prefill="int8", prepared=True)
    after = read_as(Audit, raw, written, AuditError, "")
    assert differences(before, after) == [
        "settings: threads",
        f"onnxruntime: {before.software['onnxruntime']} → 1.20.0",
        "int4, prefill: none → int8",
        "int4, prepared graphs: no → yes",
        "what int4 says about small",
    ]
    one = replace(before, variants={"int8": before.variants["int8"]})
    other = replace(after, variants={"int4": after.variants["int4"]})
    assert changes(one, other)[0].variant == "int8 → int4"


def test_memory_of_other_images_is_not_judged(written) -> None:
    """Starts and memory are of all images of a run; times of an image that both have are its own."""
    raw = json.loads(written.read_text())
    raw["workload"]["images"].popitem()
    for found in raw["variants"].values():
        for name in ("peak_mib", "anonymous_mib"):
            found["memory"][name] = figure([x * 0.5 for x in found["memory"][name]["samples"]])
    found = changes(read_audit(written), read_as(Audit, raw, written, AuditError, ""))
    assert {change.word() for change in found if not change.image} == {"other work"}
    assert "other work" not in {change.word() for change in found if change.image}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: re.sub('"schema": [0-9]+', '"schema": 99', text), "is an audit of schema 99"),
        (lambda text: text.replace('"lfm-edge audit"', '"other"'), "is not an audit"),
        (lambda text: sealed(json.loads(text.replace('"variants"', '"varieties"'))), "it has no variants"),
        (lambda text: sealed({**(r := json.loads(text)), "variants": edited(r["variants"])}), "was edited"),
        (lambda text: sealed({**(r := json.loads(text)), "variants": edited(r["variants"], "min")}), "was edited"),
        (lambda text: text.replace('"prefill": null', '"prefill": "int8"', 1), "was edited or damaged: its sha256"),
        (lambda text: re.sub('"disk_mib": [0-9.]+', '"disk_mib": 1.0', text, count=1), "was edited or damaged"),
        (lambda text: re.sub(',\\s*"sha256": "[0-9a-f]*"\\s*}$', "}", text.rstrip()), "it has no sha256"),
        (lambda text: sealed({**(r := json.loads(text)), "variants": counted(r["variants"])}), "tokens of int8, small"),
        (lambda _: "[1]", "holds no JSON object"),
    ],
)
def test_damaged_audits(written, tmp_path, capsys, damage, message) -> None:
    path = tmp_path / "bad.json"
    path.write_text(damage(written.read_text()))
    assert main(["compare", str(written), str(path)]) == 2
    assert message in capsys.readouterr().err


def counted(variants: dict) -> dict:
    next(iter(variants.values()))["images"]["small"]["prompt_tokens"] += 1
    return variants


def edited(variants: dict, to: str = "") -> dict:
    of = next(iter(variants.values()))["images"]["small"]["ttft_ms"]
    of["median"] = of[to] if to else of["median"] / 10
    return variants


def test_json(written, tmp_path, capsys) -> None:
    """The same words and exit code as the table's."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(sealed(many(json.loads(written.read_text()))))
    b.write_text(sealed(made_slower(json.loads(a.read_text()), 1.2)))
    assert main(["compare", str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["worse"] == sum(change["word"] == "worse beyond --fail-over" for change in found["changes"]) > 0
    assert found["not_valid"] == {}
    change = next(c for c in found["changes"] if c["figure"] == "ttft_ms")
    assert change["ratio"] == pytest.approx(1.2, rel=0.01)
