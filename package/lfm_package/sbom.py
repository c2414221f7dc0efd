"""What is on a stick, as a CycloneDX bill of materials: the model with every file's hash, and the wheels it runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.bom_ref import BomRef
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from lfm_runtime.errors import BundleError
from lfm_runtime.formats.files import damage_is, read_json_object
from lfm_runtime.formats.manifest import Manifest
from packageurl import PackageURL

from lfm_package.wheelhouse import Wheel

_LONGEST_LICENSE = 100  # older wheels hold the whole text there


def is_bill(path: Path) -> bool:
    """Whether `sbom` wrote this file.

    Raises:
        BundleError: it is no bill of materials at all.
    """
    found = read_json_object(path, BundleError)
    with damage_is(BundleError, path, "make it again"):
        return any(one["name"].startswith("lfm-edge:") for one in found["metadata"]["component"]["properties"])


def sbom(name: str, manifest: Manifest, wheels: Sequence[Wheel]) -> str:
    """CycloneDX 1.6 as JSON. The same inputs give the same text: no time, and a serial number made of the content.

    Args:
        name: of the bundle.
        manifest: of the bundle as it is packed.
        wheels: what it runs on; none where that is not decided.
    """
    files, source = manifest.files, asdict(manifest.source)
    content = uuid5(
        NAMESPACE_URL, "\n".join(sorted([*(entry.sha256 for entry in files.values()), *(w.sha256 for w in wheels)]))
    )
    model = Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=manifest.tool["version"],
        bom_ref=BomRef("model"),
        licenses=_licenses(source["license"] or ""),
        properties=[
            Property(name=f"lfm-edge:{key}", value=str(value))
            for key, value in {**source, "variants": ", ".join(manifest.variants)}.items()
            if value and key != "license"
        ],
        components=[
            Component(
                name=file, type=ComponentType.FILE, hashes=[_sha256(entry.sha256)], bom_ref=BomRef(f"model/{file}")
            )
            for file, entry in sorted(files.items())
        ],
    )
    libraries = [_library(wheel) for wheel in wheels]
    bom = Bom(metadata=BomMetaData(component=model), components=libraries, serial_number=content)
    bom.metadata.timestamp = None  # type: ignore[assignment]
    bom.register_dependency(model, libraries)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _library(wheel: Wheel) -> Component:
    return Component(
        name=wheel.name,
        version=str(wheel.version),
        type=ComponentType.LIBRARY,
        bom_ref=BomRef(wheel.file),
        purl=PackageURL("pypi", None, wheel.name, str(wheel.version), {"file_name": wheel.file}),
        hashes=[_sha256(wheel.sha256)],
        licenses=_licenses(wheel.license),
    )


def _licenses(text: str) -> list[License]:
    said = " ".join(text.split())
    return [LicenseFactory().make_from_string(said)] if 0 < len(said) <= _LONGEST_LICENSE else []


def _sha256(content: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=content)
