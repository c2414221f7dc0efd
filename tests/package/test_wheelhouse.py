"""What is fetched for another machine, against a second resolver (uv) and against what packaging says of this machine."""

import hashlib
import platform as platform_module
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tomllib
from lfm_package import wheelhouse as module
from lfm_package.targets import TARGETS, Platform, System, Target
from lfm_package.wheelhouse import Wheel, WheelhouseError, check, glibc_needed, read_wheelhouse, resolve, wheelhouse
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import SettingError
from lfm_runtime.installation import STICK_EXTRAS
from packaging import markers, tags

pytestmark = pytest.mark.process

OURS = Wheel(
    "lfm_edge-0.1.0-py3-none-any.whl",
    "0" * 64,
    (
        "numpy>=1.26",
        "onnxruntime!=1.21.0,!=1.24.0,!=1.24.1,>=1.20",
        "pillow>=10.1",
        "psutil>=5.9",
        "tomli>=2; python_version < '3.11'",
        "onnx>=1.17; extra == 'quantize'",
    ),
    ">=3.10",
    "Apache-2.0",
)
PI5 = Platform.of("pi5")


@pytest.mark.parametrize(
    ("target", "python", "extras"),
    [
        ("pi5", "3.13", STICK_EXTRAS),
        *(
            pytest.param(*other, (), marks=pytest.mark.slow)
            for other in (
                ("pi5", "3.11"),
                ("jetson-jp6", "3.10"),
                ("jetson-jp7", "3.12"),
                ("x86_64", "3.12"),
                ("aarch64", "3.14"),
            )
        ),
    ],
)
def test_the_same_as_another_resolver(target, python, extras, tmp_path) -> None:
    """Metadata only, from the index: the same releases as uv finds for that Python, processor and C library."""
    platform = Platform.of(target, python)
    listed = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    optional = {name: listed["optional-dependencies"][name] for name in STICK_EXTRAS}
    ours = replace(
        OURS, requires=(*OURS.requires, *(f"{text}; extra == '{name}'" for name in optional for text in optional[name]))
    )
    asked = [text for text in OURS.requires if "extra" not in text] + [
        text for name in extras for text in optional[name]
    ]
    (tmp_path / "in.txt").write_text("\n".join(asked))
    glibc = min(platform.system.glibc, 40)  # the newest that uv has a name for
    words = [
        "pip",
        "compile",
        "-q",
        "--python-version",
        python,
        "--python-platform",
        f"{platform.target.machine}-manylinux_2_{glibc}",
    ]
    words += ["--only-binary", ":all:", "--no-header", "--no-annotate", str(tmp_path / "in.txt")]
    uv = subprocess.Popen(
        [sys.executable, "-m", "uv", *words], stdout=subprocess.PIPE, text=True
    )  # beside pip: both wait for the index
    found = {wheel.name: str(wheel.version) for wheel in resolve(platform, ours, extras)}
    found.pop("pip")
    said, _ = uv.communicate()
    assert uv.returncode == 0
    assert found == dict(line.split("==") for line in said.split())
    assert {"starlette", "llguidance", "distributed"} <= found.keys() or not extras
    assert (
        found["onnxruntime"] == "1.23.2"
        if python == "3.10"
        else tuple(map(int, found["onnxruntime"].split("."))) >= (1, 31)
    )


def test_every_board_is_resolved_the_same() -> None:
    """The Raspberry Pis differ in nothing that wheels know of; so what holds for one of the list above holds for all
    targets.
    """
    assert {(t.machine, t.systems) for t in TARGETS.values()} == {
        (TARGETS[n].machine, TARGETS[n].systems) for n in ("pi5", "jetson-jp6", "jetson-jp7", "aarch64", "x86_64")
    }


def test_the_tags_are_those_packaging_says_of_this_machine() -> None:
    libc, version = platform_module.libc_ver()
    if libc != "glibc" or platform_module.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("compared on x86 Linux")
    here = Platform(
        Target("here", "x86_64", "generic-x86", ()),
        System("here", f"3.{sys.version_info.minor}", int(version.split(".")[1])),
    )
    wanted = {
        str(tag)
        for tag in tags.sys_tags()
        if "linux_x86_64" not in tag.platform.split("-") and not tag.platform.startswith("linux")
    }
    assert {str(tag) for tag in here.tags} == wanted


def test_markers_are_all_there() -> None:
    assert PI5.markers.keys() == {*markers.default_environment(), "extra"}
    assert PI5.markers["platform_machine"] == "aarch64"


def wheel(name: str, *, requires=(), python="") -> Wheel:
    return Wheel(name, "0" * 64, tuple(requires), python, "")


@pytest.mark.parametrize(
    ("wheels", "said"),
    [
        ([wheel("numpy-2.4.6-cp313-cp313-manylinux_2_28_x86_64.whl")], "does not run on"),
        ([wheel("numpy-2.4.6-cp312-cp312-manylinux_2_28_aarch64.whl")], "does not run on"),
        ([wheel("numpy-2.4.6-cp313-cp313-manylinux_2_99_aarch64.whl")], "does not run on"),
        ([wheel("numpy-2.4.6-cp313-cp313-win_amd64.whl")], "does not run on"),
        ([wheel("old-1-py3-none-any.whl", python="<3.13")], "needs Python <3.13"),
        ([wheel("a-1-py3-none-any.whl"), wheel("a-2-py3-none-any.whl")], "more than once"),
        ([wheel("a-1-py3-none-any.whl", requires=["b>=2"])], "needs b>=2"),
        ([wheel("a-1-py3-none-any.whl", requires=["b>=2"]), wheel("b-1-py3-none-any.whl")], "needs b>=2"),
        ([wheel("a-1-py3-none-any.whl", requires=["b; platform_machine == 'aarch64'"])], "needs b"),
        (
            [
                OURS,
                *(wheel(f"{n}-99-py3-none-any.whl") for n in ("numpy", "pillow", "psutil")),
                wheel("onnxruntime-1.21.0-cp313-cp313-manylinux_2_28_aarch64.whl"),
            ],
            "needs onnxruntime!=1.21.0",
        ),
    ],
)
def test_what_cannot_run_there_is_refused(wheels, said) -> None:
    with pytest.raises(WheelhouseError, match=re.escape(said)):
        check(PI5, wheels)


def test_what_holds_elsewhere_alone_is_not_asked_for() -> None:
    check(
        PI5,
        [
            wheel(
                "a-1-py3-none-any.whl",
                requires=["tomli; python_version < '3.11'", "b; sys_platform == 'win32'", "c; extra == 'x'"],
            )
        ],
    )


def test_glibc_of_the_oldest_tag_that_a_wheel_has() -> None:
    names = [
        "a-1-cp313-cp313-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
        "b-1-cp36-abi3-manylinux2014_aarch64.manylinux_2_17_aarch64.whl",
    ]
    assert glibc_needed([wheel(name) for name in names]) == 27
    assert glibc_needed([wheel("c-1-py3-none-any.whl")]) == 0


def test_a_real_one(tmp_path) -> None:
    """For a Raspberry Pi 5, of the index's real wheels: small enough, pinned, and what pip takes with hashes and
    without an index.
    """
    folder = tmp_path / "wheels"
    assert main(["wheelhouse", "--target", "pi5", "-o", str(folder)]) == 0
    found = read_wheelhouse(folder)
    assert sum(wheel.size for wheel in found) <= 60e6
    assert {wheel.name for wheel in found} == {
        "lfm-edge",
        "numpy",
        "onnxruntime",
        "pillow",
        "psutil",
        "pip",
        "flatbuffers",
        "packaging",
        "protobuf",
    }
    pins = (folder / "requirements.txt").read_text()
    for wheel in found:
        data = (folder / wheel.file).read_bytes()
        pinned = f"{wheel.name}=={wheel.version} --hash=sha256:{hashlib.sha256(data).hexdigest()}"
        assert f"\n{'# ' if wheel.name == 'pip' else ''}{pinned}\n" in pins
    words = [
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-index",
        "--find-links",
        str(folder),
        "--require-hashes",
        "-r",
        str(folder / "requirements.txt"),
    ]
    words += [
        "--target",
        str(tmp_path / "x"),
        "--only-binary=:all:",
        "--ignore-requires-python",
        "--python-version",
        "3.13",
        "--platform",
        "manylinux_2_28_aarch64",
        "--platform",
        "manylinux_2_17_aarch64",
        "--platform",
        "manylinux2014_aarch64",
    ]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / next(wheel.file for wheel in found if wheel.name == "lfm-edge")) as archive:
        names = archive.namelist()
    assert "lfm_runtime/commands/cli.py" in names
    assert "lfm_package/install.sh" in names
    for name in ("photo.jpg", "mine-1.0-py3-none-any.whl"):
        (folder / name).write_bytes(b"mine")
        with pytest.raises(WheelhouseError, match=f"{name} was not written by lfm-edge wheelhouse"):
            wheelhouse(PI5, folder)
        (folder / name).unlink()
    (folder / "requirements.txt").write_text(f"{pins}more==1.0\n")
    with pytest.raises(
        WheelhouseError, match=r"requirements.txt was not written by lfm-edge wheelhouse, or was edited"
    ):
        wheelhouse(PI5, folder)
    (folder / "requirements.txt").write_text(pins)
    module._check_ours(folder)


def test_our_own_wheel_is_made_again_from_where_it_was_installed(tmp_path) -> None:
    a, b = (module._our_wheel(tmp_path / name) for name in ("a", "b") if (tmp_path / name).mkdir() is None)
    assert (a.sha256, a.name) == (b.sha256, "lfm-edge")


def test_targets_that_do_not_exist_are_refused(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SettingError, match="targets are pi5, pi4"):
        Platform.of("pi6")
    with pytest.raises(SettingError, match=r"pi5 has no Python 3.9; it has 3.13 \(Raspberry Pi OS trixie\), 3.11"):
        Platform.of("pi5", "3.9")
    assert main(["wheelhouse", "--target", "jetson-jp5", "-o", str(tmp_path / "w")]) == 2
    assert "unknown target 'jetson-jp5'" in capsys.readouterr().err
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(WheelhouseError, match="check that the package index can be reached"):
        resolve(PI5, OURS)
    (tmp_path / "bad.whl").write_bytes(b"PK")
    with pytest.raises(WheelhouseError, match="is not a wheel"):
        Wheel.read(tmp_path / "bad.whl")
    with pytest.raises(WheelhouseError, match="holds no wheels"):
        read_wheelhouse(Path(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["photo.jpg", "mine-1.0-py3-none-any.whl", "requirements.txt", "folder.whl/a"])
def test_a_folder_of_somebody_else_stays(tmp_path, monkeypatch, name) -> None:
    """A folder of wheels that the user collected is no wheelhouse."""
    monkeypatch.setattr(module, "_our_wheel", lambda _: pytest.fail("works"))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\xff mine")
    with pytest.raises(WheelhouseError, match=f"{name.partition('/')[0]} was not written by lfm-edge wheelhouse"):
        wheelhouse(PI5, tmp_path)
    assert (tmp_path / name).read_bytes() == b"\xff mine"
