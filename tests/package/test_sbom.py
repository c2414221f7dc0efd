"""The bill of materials against CycloneDX's own schema, and against what is there."""

import hashlib
import json
from dataclasses import replace

from lfm_package.pack import reduced
from lfm_package.sbom import sbom
from lfm_package.wheelhouse import Wheel

WHEELS = [
    Wheel("numpy-2.4.6-cp313-cp313-manylinux_2_28_aarch64.whl", "a" * 64, (), "", "BSD-3-Clause"),
    Wheel("odd-1.0-py3-none-any.whl", "b" * 64, (), "", "Copyright (c) somebody\n" * 50),
]


def test_valid_complete_and_the_same_again(demo_bundle) -> None:
    from cyclonedx.schema import SchemaVersion  # seconds, for grammars
    from cyclonedx.validation.json import JsonStrictValidator

    manifest = reduced(demo_bundle, ["fp32"])
    text = sbom("cam", manifest, WHEELS)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert sbom("cam", manifest, WHEELS) == text
    assert "timestamp" not in text
    found = json.loads(text)
    model = found["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "cam")
    for file in model["components"]:
        assert file["hashes"] == [
            {"alg": "SHA-256", "content": hashlib.sha256((demo_bundle / file["name"]).read_bytes()).hexdigest()}
        ]
    assert {file["name"] for file in model["components"]} == manifest.files.keys()
    assert {(c["name"], c["version"]) for c in found["components"]} == {("numpy", "2.4.6"), ("odd", "1.0")}
    numpy = next(c for c in found["components"] if c["name"] == "numpy")
    assert numpy["purl"].startswith("pkg:pypi/numpy@2.4.6")
    assert numpy["licenses"] == [{"license": {"id": "BSD-3-Clause"}}]
    assert sbom("cam", manifest, WHEELS[:1]) != text


def test_the_models_licence_is_said(demo_bundle) -> None:
    manifest = reduced(demo_bundle, ["fp32"])
    manifest = replace(manifest, source=replace(manifest.source, license="lfm1.0"))
    assert json.loads(sbom("cam", manifest, []))["metadata"]["component"]["licenses"] == [
        {"license": {"name": "lfm1.0"}}
    ]
