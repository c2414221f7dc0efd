"""Sticks: what is on them, as a folder and as one file; and what cannot become one."""

import hashlib
import json
import shutil
import subprocess
import tarfile

import pytest
from lfm_package import stick as module
from lfm_package.targets import Platform
from lfm_package.unpack import unpack
from lfm_package.wheelhouse import Wheel
from lfm_runtime.bundle import Bundle
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError

pytestmark = pytest.mark.process

PI5 = Platform.of("pi5")


@pytest.fixture
def no_fetching(monkeypatch) -> None:
    """One wheel that was made here, instead of 46 MB of them."""

    def few(platform, folder, extras):
        folder.mkdir()
        (folder / "onnxruntime-1.20.0-cp313-cp313-manylinux_2_28_aarch64.whl").write_bytes(b"")
        (folder / "requirements.txt").write_text("")
        return [Wheel("onnxruntime-1.20.0-cp313-cp313-manylinux_2_28_aarch64.whl", "0" * 64, (), "", "MIT", 9, 99)]

    monkeypatch.setattr(module, "wheelhouse", few)


def test_everything_is_there_and_summed(stick_once) -> None:
    names = {p.relative_to(stick_once).as_posix() for p in stick_once.rglob("*") if p.is_file()}
    assert {"install.sh", "stick.conf", "cam.tar", "cam.cdx.json", "SHA256SUMS", "wheels/requirements.txt"} <= names
    summed = dict(reversed(line.split("  ")) for line in (stick_once / "SHA256SUMS").read_text().splitlines())
    assert summed.keys() == names - {"SHA256SUMS"}
    assert all(
        hashlib.sha256((stick_once / name).read_bytes()).hexdigest() == digest for name, digest in summed.items()
    )
    assert {c["name"] for c in json.loads((stick_once / "cam.cdx.json").read_text())["components"]} >= {
        "numpy",
        "onnxruntime",
        "pillow",
        "psutil",
    }
    assert subprocess.run(["sh", "-n", str(stick_once / "install.sh")], check=False).returncode == 0


def test_as_one_file(demo_bundle, no_fetching, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / name / "cam.tar")
        assert [p.name for p in (tmp_path / name).iterdir()] == ["cam.tar"]
    assert (tmp_path / "a" / "cam.tar").read_bytes() == (tmp_path / "b" / "cam.tar").read_bytes()
    subprocess.run(["tar", "xf", str(tmp_path / "a" / "cam.tar"), "-C", str(tmp_path)], check=True)
    module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / "folder" / "cam")
    files = [
        sorted(p.relative_to(place).as_posix() for p in place.rglob("*"))
        for place in (tmp_path / "cam", tmp_path / "folder" / "cam")
    ]
    assert files[0] == files[1]
    assert (tmp_path / "cam" / "install.sh").stat().st_mode & 0o111
    unpack(tmp_path / "cam" / "cam.tar", tmp_path / "there")
    assert list(Bundle.open(tmp_path / "there").variants) == ["fp32"]


def test_a_model_larger_than_fat_holds_is_split(demo_bundle, no_fetching, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_FILE", 10_000_000)
    module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / "cam")
    assert (tmp_path / "cam" / "cam.tar.002").exists()
    assert not (tmp_path / "cam" / "cam.tar").exists()
    unpack(tmp_path / "cam" / "cam.tar", tmp_path / "there")


def test_again_and_not_over_something_else(demo_bundle, no_fetching, tmp_path) -> None:
    for _ in range(2):
        module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / "cam")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(BundleError, match="is not something lfm-edge stick made"):
        module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / "photos")
    (tmp_path / "cam" / "holiday.jpg").write_text("")
    with pytest.raises(BundleError, match=r"holiday.jpg is not part of the stick and would be lost"):
        module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / "cam")
    with pytest.raises(BundleError, match="has no variant 'int4'"):
        module.write_stick(demo_bundle, ["int4"], PI5, tmp_path / "cam")
    assert (tmp_path / "cam" / "cam.tar").exists()
    for name, place in (("link", "media"), ("link.tar", "media/cam.tar")):
        (tmp_path / name).symlink_to(place)  # whether it leads to something or not
        for _ in range(2):
            with pytest.raises(BundleError, match=f"{name} is a link; name what it leads to: .*{place}"):
                module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / name)
            (tmp_path / "media").mkdir(exist_ok=True)
        assert (tmp_path / name).is_symlink()
        assert not any((tmp_path / "media").iterdir())


def test_a_model_too_new_for_the_board(bundle_copy, no_fetching, tmp_path) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    for graph in manifest["graphs"].values():
        graph["min_onnxruntime"] = "1.25.0"
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"needs onnxruntime 1.25.0 or later; the newest for pi5: .* is 1.20.0"):
        module.write_stick(bundle_copy, ["fp32"], PI5, tmp_path / "cam")
    assert not (tmp_path / "cam").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "pi6", "--variant", "fp32"], "unknown target 'pi6'; targets are pi5"),
        (["--target", "pi5", "--variant", "int8"], "has no variant 'int8'"),
        (["--target", "pi5", "--variant", "fp32", "--profile", "zzz"], "there is no profile 'zzz'"),
        (["--target", "pi5", "--variant", "fp32", "--sign", "/no/key"], "/no/key does not exist; make a key"),
    ],
)
def test_bad_words(demo_bundle, no_fetching, tmp_path, capsys, words, said) -> None:
    assert main(["stick", str(demo_bundle), "--target", "pi5", "--variant", "fp32", "-o", "/"]) == 2
    assert "not something lfm-edge stick made" in capsys.readouterr().err
    assert main(["stick", str(demo_bundle), *words, "-o", str(tmp_path / "cam")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cam").exists()


def test_tar_holds_no_owner_or_time(demo_bundle, no_fetching, tmp_path) -> None:
    module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / "cam.tar")
    with tarfile.open(tmp_path / "cam.tar") as tar:
        assert {(entry.uid, entry.gid, entry.mtime) for entry in tar} == {(0, 0, 0)}


@pytest.mark.parametrize("name", ["cam", "cam.tar"])
def test_a_stick_of_another_board_or_a_signed_one_stays(demo_bundle, no_fetching, tmp_path, capsys, name) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    output = tmp_path / name
    words = ["stick", str(demo_bundle), "--variant", "fp32", "-o", str(output)]
    assert main([*words, "--target", "pi5", "--sign", str(key)]) == 0
    whole = output if name.endswith(".tar") else output / "SHA256SUMS"
    before = whole.read_bytes()
    for more, said in (
        (["--target", "x86_64", "--sign", str(key)], "is a stick for pi5"),
        (["--target", "pi5"], "is a signed stick; sign this one too"),
        (
            ["--target", "pi5", "--sign", str(key), "--profile", "jetson-orin-cuda"],
            "runs on a GPU, and the stick's onnxruntime does not",
        ),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
        assert whole.read_bytes() == before
    assert main([*words, "--target", "pi5", "--sign", str(key)]) == 0
    assert main([*words, "--target", "pi5", "--force"]) == 0


def test_a_stick_takes_what_its_board_will_choose(bundle_copy, no_fetching, tmp_path, capsys) -> None:
    """pi4 reads prompts with int8's decoder: where the bundle has one, it is on the stick."""
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    for stem, name in manifest["variants"]["fp32"].items():
        for suffix, other in (("int8", "_int8"), ("int4", "_q4")):
            copy = name if stem == "embed_tokens" else name.replace(".onnx", f"{other}.onnx")
            manifest["variants"].setdefault(suffix, {})[stem] = copy
            for old, new in ((name, copy), (f"{name}_data", f"{copy}_data")):
                if old != new and (bundle_copy / old).exists():
                    shutil.copy(bundle_copy / old, bundle_copy / new)
                    manifest["files"][new] = manifest["files"][old]
            if name != copy:
                manifest["graphs"][copy] = manifest["graphs"][name]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    assert main(["stick", str(bundle_copy), "--target", "pi4", "-o", str(tmp_path / "cam")]) == 0
    said = capsys.readouterr().out
    assert "profile pi4: int4, int8 for the prefill" in said
    settings = (tmp_path / "cam" / "stick.conf").read_text()
    assert "variant=int4\n" in settings
    assert "prefill=int8\n" in settings
    assert (
        main(["stick", str(bundle_copy), "--target", "pi4", "--prefill", "none", "-o", str(tmp_path / "cam.tar")]) == 0
    )
    assert "tar xf cam.tar && sh cam/install.sh" in capsys.readouterr().out


def test_room_is_looked_at_before_wheels_are_fetched(demo_bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "wheelhouse", lambda *_: pytest.fail("downloads"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=3 << 20))
    for name in ("cam", "cam.tar"):
        with pytest.raises(BundleError, match=r"has 3 MiB free, .* needs .* MiB more; free some space"):
            module.write_stick(demo_bundle, ["fp32"], PI5, tmp_path / name)
