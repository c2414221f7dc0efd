"""install.sh on real sticks, from the first version to none: no network, no root needed, old or new at every moment."""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sticks import another, failed, install, sums

QUESTION = ["-p", "What is in this image?", "--temperature", "0", "--max-new-tokens", "4"]

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="the stick is for x86 Linux"),
]


def answer(prefix: Path, photo: Path) -> str:
    command = prefix / "bin" / "lfm-edge"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LFM_", "PYTHON"))}
    words = [str(command), "run", str(prefix / "current" / "bundle"), str(photo), *QUESTION]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=kept).stdout


def tree(folder: Path) -> dict[str, tuple[int, float]]:
    return {
        str(p.relative_to(folder)): (p.lstat().st_ino, p.lstat().st_mtime)
        for p in folder.rglob("*")
        if "__pycache__" not in p.parts and p.name != ".lock"
    }


def test_a_life(stick, tmp_path, photo, demo_model) -> None:
    """Installed, run, again, another version, back, forth, removed: in a folder with a blank and a quote in its name."""
    prefix = tmp_path / "somebody's apps" / "edge"
    done = install(stick, prefix)
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout
    wanted = demo_model.answer([photo], QUESTION[1], temperature=0, max_new_tokens=4).text()
    assert answer(prefix, photo).strip() == wanted.strip()
    first = str((prefix / "current").readlink())
    assert first.startswith("versions/cam-")
    assert (prefix / first / "bundle.prepared").is_dir()

    before = tree(prefix)
    done = install(stick, prefix)
    assert "is installed already" in done.stdout
    after = tree(prefix)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"bin", "bin/lfm-edge", "bin/lfm-edge-install", ".lfm-edge"}, "these are written again, the same"

    another(stick, name="newer")
    done = install(stick, prefix)
    assert done.returncode == 0, done.stderr
    assert str((prefix / "current").readlink()).startswith("versions/newer-")
    assert str((prefix / "previous").readlink()) == first
    assert answer(prefix, photo).strip() == wanted.strip()

    for now in (first, "versions/newer"):
        assert install(stick, prefix, "--rollback").returncode == 0
        assert str((prefix / "current").readlink()).startswith(now)
        assert answer(prefix, photo).strip() == wanted.strip()

    another(stick, name="third one, für später")
    assert install(stick, prefix).returncode == 0
    names = sorted(p.name.split("-")[0] for p in (prefix / "versions").iterdir())
    assert names == ["newer", "third one, für später"], "the current one and the one before"

    (prefix / str((prefix / "current").readlink()) / "bundle" / "manifest.json").write_text("{}")
    done = install(stick, prefix)
    assert done.returncode == 0, done.stderr
    assert "is damaged (" in done.stdout
    assert str((prefix / "current").readlink()).startswith("versions/third")
    assert answer(prefix, photo).strip() == wanted.strip()

    kept = prefix / "bin" / "lfm-edge-install"  # knows its place, and needs no stick
    assert subprocess.run(["sh", str(kept), "--rollback"], check=False).returncode == 0
    assert str((prefix / "current").readlink()).startswith("versions/newer")
    (prefix / "previous").unlink()  # as if the power had failed between two switches
    assert subprocess.run(["sh", str(kept), "--rollback"], check=False).returncode == 0
    assert str((prefix / "current").readlink()).startswith("versions/third")
    done = subprocess.run(["sh", str(kept), "--stick", str(stick)], capture_output=True, text=True, check=False)
    assert "is installed already" in done.stdout, done.stderr

    assert subprocess.run(["sh", str(kept), "--uninstall"], check=False).returncode == 0
    assert not prefix.exists()
    assert "nothing is installed" in failed(install(stick, prefix, "--uninstall"))
    assert "nothing is installed" in failed(install(stick, prefix, "--rollback"))


def test_strangers_files_stay(stick, tmp_path) -> None:
    prefix = tmp_path / "edge"
    (prefix / "versions" / "3.12.1").mkdir(parents=True)
    for words in ([], ["--uninstall"], ["--rollback"]):  # ~/.pyenv, say
        assert "name " in failed(install(stick, prefix, *words))
        assert (prefix / "versions" / "3.12.1").exists()
    shutil.rmtree(prefix / "versions")
    (prefix / "bin").mkdir()
    for file in ("bin/lfm-edge", "bin/lfm-edge-install", "current"):  # of pip --user in ~/.local, say
        (prefix / file).symlink_to("/nowhere")
        assert f"{prefix / file} was not made by this script; name another folder" in failed(install(stick, prefix))
        assert [p for p in prefix.rglob("*") if p.name != "bin"] == [prefix / file]
        (prefix / file).unlink()
    (prefix / "bin").rmdir()
    (prefix / ".lfm-edge").write_text("")
    (prefix / "versions" / "backup").mkdir(parents=True)
    (prefix / "versions" / "backup" / "photo.txt").write_text("mine")
    (prefix / "versions" / "half").mkdir()
    (prefix / "versions" / "half" / ".lfm-edge").write_text("")  # a version that was not finished
    (prefix / "photos").mkdir()
    (prefix / "photos" / "cat.jpg").write_text("")
    done = install(stick, prefix, "--uninstall")
    assert done.returncode == 0
    assert "is removed; other files are still there" in done.stdout
    assert sorted(p.name for p in prefix.rglob("*")) == ["backup", "cat.jpg", "photo.txt", "photos", "versions"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to be another user")
def test_another_user_is_told_whose_it_is(stick) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        prefix = Path(folder) / "edge"
        (prefix / "versions").mkdir(parents=True)
        (prefix / ".lfm-edge").write_text("")
        Path(folder).chmod(0o755)
        script = shutil.copy(stick / "install.sh", folder)
        for action in ("--rollback", "--uninstall"):
            words = ["setpriv", "--reuid=65534", "--clear-groups", "sh", script, "--prefix", str(prefix), action]
            done = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/")
            assert done.returncode == 2
            owner = pwd.getpwuid(os.geteuid()).pw_name
            assert done.stderr.endswith(f"; run this as {owner}, whose folder it is\n"), done.stderr
            assert done.stderr.count("\n") == 1
        assert (prefix / ".lfm-edge").exists()


def test_what_somebody_put_into_the_bundle_stays(stick, tmp_path) -> None:
    """Only what the bundle's SHA256SUMS names is removed, and nothing outside it."""
    prefix = tmp_path / "edge"
    bundle = prefix / "versions" / "one" / "bundle"
    (bundle / "onnx").mkdir(parents=True)
    (prefix / ".lfm-edge").write_text("")
    for name in (".lfm-edge", "complete"):
        (bundle.parent / name).write_text("")
    for name in ("manifest.json", "onnx/decoder.onnx", "notes.txt", "../../../photo.jpg"):
        (bundle / name).write_text("x")
    names = ("manifest.json", "onnx/decoder.onnx", "../../../photo.jpg")
    (bundle / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))
    assert install(stick, prefix, "--uninstall").returncode == 0
    assert sorted(p.name for p in prefix.rglob("*") if p.is_file()) == ["notes.txt", "photo.jpg"]
    assert not (bundle / "onnx").exists()


def test_what_lies_about_is_not_imported(stick, tmp_path) -> None:
    """Neither on the stick nor in the folder that it is started in."""
    for place in (stick, tmp_path):
        for name in ("venv", "struct", "platform", "onnxruntime", "json"):
            (place / f"{name}.py").write_text("raise SystemExit('imported')")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LFM_", "PYTHON"))}
    for place in (stick, tmp_path):
        done = subprocess.run(
            ["sh", str(stick / "install.sh"), "--prefix", str(tmp_path / "edge")],
            capture_output=True,
            text=True,
            check=False,
            cwd=place,
            env={**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"},
        )
        assert done.returncode == 0, done.stderr
        assert "imported" not in done.stdout + done.stderr
    done = subprocess.run(
        [str(tmp_path / "edge" / "bin" / "lfm-edge"), "doctor"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=kept,
    )
    assert "problems: 0" in done.stdout, done.stdout


@pytest.mark.slow  # forty seconds
def test_a_model_that_fails_its_selftest_is_not_switched_to(stick, tmp_path) -> None:
    """A version that computes something else here is not made the current one; one that is over its budget is, with a
    warning.
    """
    import json

    from lfm_package.pack import Extras, pack
    from lfm_package.unpack import unpack
    from lfm_profiles import read

    prefix = tmp_path / "edge"
    assert install(stick, prefix).returncode == 0
    good = str((prefix / "current").readlink())
    unpack(stick / "cam.tar", tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    right = manifest["golden"]["fp32"]["prompt"]
    manifest["golden"]["fp32"]["prompt"] = [right[0] + 1, *right[1:]]
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    pack(tmp_path / "bundle", ["fp32"], stick / "cam.tar")
    sums(stick)
    done = install(stick, prefix)
    assert "cam-" in failed(done)
    assert "FAILED   golden values" in done.stdout
    assert str((prefix / "current").readlink()) == good
    assert len(list((prefix / "versions").iterdir())) == 1

    manifest["golden"]["fp32"]["prompt"] = right
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "hurry.toml").write_text('description = "x"\nextends = "generic"\n[budget]\nttft_ms = 1\n')
    pack(tmp_path / "bundle", ["fp32"], stick / "cam.tar", Extras(profile=read(str(tmp_path / "hurry.toml"))))
    sums(stick)
    done = install(stick, prefix)
    assert done.returncode == 0, done.stderr
    assert "FAILED   budgets" in done.stdout
    assert "warning: it works, but a budget of the profile is exceeded or the board is throttled" in done.stdout


def test_signatures(stick, tmp_path) -> None:
    """Whoever once asked for signatures gets no unsigned version any more."""
    for name in ("ours", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    signers = tmp_path / "signers"
    signers.write_text(f"us {(tmp_path / 'ours.pub').read_text()}")
    prefix = tmp_path / "edge"
    assert "is not signed, but" in failed(install(stick, prefix, "--signers", str(signers)))
    assert "does not exist; give a file with the allowed signers" in failed(
        install(stick, prefix, "--signers", str(tmp_path / "no"))
    )
    for key, said in (("stranger", "is not signed by anyone in"), ("ours", "")):
        (stick / "SHA256SUMS.sig").unlink(missing_ok=True)
        subprocess.run(
            ["ssh-keygen", "-q", "-Y", "sign", "-f", str(tmp_path / key), "-n", "lfm-edge", str(stick / "SHA256SUMS")],
            check=True,
            capture_output=True,
        )
        done = install(stick, prefix, "--signers", str(signers))
        assert said in failed(done) if said else done.returncode == 0, done.stderr
    assert "signed by us" in done.stdout
    assert (prefix / "signers").read_text() == signers.read_text()
    another(stick, name="newer")
    assert "does not match us's signature" in failed(install(stick, prefix))
    (stick / "SHA256SUMS.sig").unlink()
    assert "is not signed" in failed(install(stick, prefix))


def test_two_at_once(stick, tmp_path) -> None:
    prefix = tmp_path / "edge"
    (prefix / "versions").mkdir(parents=True)
    (prefix / ".lfm-edge").write_text("")
    held = subprocess.Popen(["flock", str(prefix / ".lock"), "sleep", "60"], start_new_session=True)
    try:
        while subprocess.run(["flock", "-n", str(prefix / ".lock"), "true"], check=False).returncode == 0:
            pass
        assert "is being changed by another" in failed(install(stick, prefix))
    finally:
        os.killpg(held.pid, signal.SIGKILL)


def test_interrupted(stick, tmp_path) -> None:
    """130, as the signal's; what was begun is gone."""
    prefix = tmp_path / "edge"
    began = subprocess.Popen(
        ["sh", str(stick / "install.sh"), "--prefix", str(prefix)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert "installing the runtime" in began.stdout.readline()
    os.killpg(began.pid, signal.SIGTERM)
    _, said = began.communicate()
    assert began.returncode == 130, said
    assert "install.sh: interrupted; still installed: nothing" in said
    assert list((prefix / "versions").iterdir()) == []


def test_the_installed_copy_asks_for_the_stick(stick, tmp_path) -> None:
    prefix = tmp_path / "edge"
    (prefix / "bin").mkdir(parents=True)
    (prefix / ".lfm-edge").write_text("")
    copy = Path(shutil.copy(stick / "install.sh", prefix / "bin" / "lfm-edge-install"))
    done = subprocess.run(["sh", str(copy)], capture_output=True, text=True, check=False)
    assert f"which stick? name its folder: '{copy}' --stick FOLDER" in failed(done)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(stick, tmp_path) -> None:
    """Said before anything is written; and where the disk fills up all the same, the old version works on and the next
    run succeeds.
    """
    prefix = tmp_path / "edge"
    prefix.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(prefix)], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        assert install(stick, prefix).returncode == 0
        old = (prefix / "current").readlink()
        filler = prefix / "photos"
        another(stick, name="newer")
        for free in (100 << 20, 3 << 20):  # full while wheels, bundle or environment are written
            filler.write_bytes(b"\0" * (shutil.disk_usage(prefix).free - free))
            assert "MiB more; free some space" in failed(install(stick, prefix))
            another(stick, need_kib="1")
            assert "could not be installed; still installed: cam-" in failed(install(stick, prefix))
            another(stick, need_kib="100000000" if free > 3 << 20 else "1")
            assert (prefix / "current").readlink() == old
            assert [p.name for p in (prefix / "versions").iterdir()] == [old.name]
            filler.unlink()
        assert install(stick, prefix).returncode == 0
    finally:
        subprocess.run(["umount", str(prefix)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("debootstrap"), reason="needs root and debootstrap")
def test_from_an_empty_root(demo_bundle, tmp_path, photo) -> None:
    """Debian with nothing but Python, no network: from the stick to an answer."""
    from lfm_package.stick import write_stick
    from lfm_package.targets import Platform

    root, stick = tmp_path / "root", tmp_path / "stick"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=python3", "trixie", str(root)], check=True, capture_output=True
    )
    write_stick(demo_bundle, ["fp32"], Platform.of("x86_64", "3.13"), stick)
    shutil.copy(photo, stick / "photo.jpg")
    script = """
        mount -t proc proc "$0/proc"; mount --rbind /dev "$0/dev"; mkdir "$0/stick"; mount --bind "$1" "$0/stick"
        exec env -i PATH=/usr/bin:/usr/sbin HOME=/root chroot "$0" sh -euc '
            sh /stick/install.sh >&2
            cd /root/.local/share/lfm-edge && bin/lfm-edge run current/bundle /stick/photo.jpg -p "What is this?" --max-new-tokens 4'
    """
    done = subprocess.run(
        ["unshare", "-m", "-n", "sh", "-euc", script, str(root), str(stick)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
