"""Signatures, made and checked with ssh-keygen as anybody has it."""

import subprocess
from pathlib import Path

import pytest
from lfm_package.pack import Extras, pack
from lfm_package.signature import check_signature, sign
from lfm_package.unpack import unpack
from lfm_package.verify import verify
from lfm_runtime.commands.cli import main
from lfm_runtime.errors import BundleError, SettingError

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """A key `ours`, one of a stranger, and who may sign."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "stranger"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)], check=True
        )
    public = (folder / "ours.pub").read_text().split()
    (folder / "signers").write_text(f'release@example.com namespaces="lfm-edge" {public[0]} {public[1]}\n')
    (folder / "for-mail").write_text(f'release@example.com namespaces="mail" {public[0]} {public[1]}\n')
    return folder


def test_signed_and_checked(demo_bundle, keys, tmp_path, capsys) -> None:
    for name in ("a", "b"):
        pack(demo_bundle, ["fp32"], tmp_path / name / "cam.tar", Extras(sign_with=keys / "ours")) if (
            tmp_path / name
        ).mkdir() is None else None
    assert (tmp_path / "a" / "cam.tar").read_bytes() == (tmp_path / "b" / "cam.tar").read_bytes(), (
        "ed25519 signs the same bytes alike"
    )
    signed = tmp_path / "there"
    unpack(tmp_path / "a" / "cam.tar", signed, signers=keys / "signers")
    assert verify(signed, signers=keys / "signers") == []
    assert verify(signed) == [], "who asks for no signature needs no ssh-keygen"
    assert check_signature(signed / "SHA256SUMS", keys / "signers") == "release@example.com"
    assert main(["verify", str(signed), "--signers", str(keys / "signers")]) == 0
    assert (
        main(["unpack", str(tmp_path / "a" / "cam.tar"), "-o", str(signed), "--signers", str(keys / "signers")]) == 0
    ), "a signed bundle is replaced"
    capsys.readouterr()
    assert main(["verify", str(signed), "--signers", str(keys / "for-mail")]) == 1
    assert "does not match release@example.com's signature" in capsys.readouterr().out
    assert main(["verify", str(signed), "--signers", str(keys / "ours.pub")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    made = line.partition("make one: ")[2].replace("> signers", f"> {tmp_path}/signers")
    subprocess.run(made, shell=True, check=True)
    assert main(["verify", str(signed), "--signers", str(tmp_path / "signers")]) == 0


def test_nobody_else(demo_bundle, keys, tmp_path) -> None:
    pack(demo_bundle, ["fp32"], tmp_path / "strange.tar", Extras(sign_with=keys / "stranger"))
    pack(demo_bundle, ["fp32"], tmp_path / "plain.tar")
    with pytest.raises(BundleError, match=r"/strange\.tar: SHA256SUMS is not signed by anyone in"):
        unpack(tmp_path / "strange.tar", tmp_path / "there", signers=keys / "signers")
    with pytest.raises(BundleError, match="is not signed"):
        unpack(tmp_path / "plain.tar", tmp_path / "there", signers=keys / "signers")
    assert not (tmp_path / "there").exists()


def test_changed_after_signing(demo_bundle, keys, tmp_path) -> None:
    """Somebody who changes a file and every hash of it still cannot sign."""
    pack(demo_bundle, ["fp32"], tmp_path / "cam.tar", Extras(sign_with=keys / "ours"))
    unpack(tmp_path / "cam.tar", tmp_path / "there")
    sums = tmp_path / "there" / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("a", "b", 1))
    (problem,) = verify(tmp_path / "there", signers=keys / "signers")
    assert "does not match release@example.com's signature" in problem


def test_keys_that_cannot_sign_are_refused(demo_bundle, keys, tmp_path, monkeypatch) -> None:
    with pytest.raises(SettingError, match="does not exist; make a key with: ssh-keygen"):
        pack(demo_bundle, ["fp32"], tmp_path / "x.tar", Extras(sign_with=keys / "nobody"))
    with pytest.raises(SettingError, match=r"is a folder; name a private key$"):
        pack(demo_bundle, ["fp32"], tmp_path / "x.tar", Extras(sign_with=tmp_path))
    (tmp_path / "text").write_text("no key")
    (tmp_path / "text").chmod(0o600)
    with pytest.raises(SettingError, match="cannot sign"):
        sign(keys / "signers", tmp_path / "text")
    with pytest.raises(SettingError, match="does not exist; give a file with the allowed signers"):
        check_signature(keys / "signers", tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    (keys / "signers.sig").write_text("")
    with pytest.raises(SettingError, match="install it with: sudo apt install openssh-client"):
        check_signature(keys / "signers", keys / "signers")


@pytest.mark.parametrize("split", [[], ["--split", "10M"]])
def test_a_signed_archive_is_not_replaced_by_an_unsigned_one(demo_bundle, keys, tmp_path, capsys, split) -> None:
    words = ["pack", str(demo_bundle), "--variant", "fp32", "-o", str(tmp_path / "cam.tar"), *split]
    assert main([*words, "--sign", str(keys / "ours")]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(words) == 2
    assert "is signed; sign this one too: --sign KEY, or replace it with --force" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*words, "--sign", str(keys / "ours")]) == 0
    assert main([*words, "--force"]) == 0
