"""Signatures that `ssh-keygen -Y` makes: it is on every board, and keys are those people have.

A packed bundle, and a stick, carry SHA256SUMS.sig over their SHA256SUMS, which names every other file. Who may sign is
said by a file in the form of ssh's allowed_signers (see ssh-keygen(1)): one line `NAME namespaces="lfm-edge"
ssh-ed25519 AAAA…` each.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from lfm_runtime.errors import BundleError, SettingError

NAMESPACE = "lfm-edge"
SUFFIX = ".sig"


def check_key(key: Path) -> None:
    """Before long work: raise SettingError where there is no such key."""
    if key.is_dir():
        raise SettingError(f"{key} is a folder; name a private key")
    if not key.is_file():
        raise SettingError(f"{key} does not exist; make a key with: ssh-keygen -t ed25519 -f {shlex.quote(str(key))}")


def sign(path: Path, key: Path) -> Path:
    """Write PATH.sig with a private key, or with a public one whose private part ssh-agent holds.

    Raises:
        SettingError: no such key, or ssh-keygen cannot use it.
    """
    check_key(key)
    signature = path.with_name(path.name + SUFFIX)
    signature.unlink(missing_ok=True)  # ssh-keygen would ask
    done = _ssh_keygen("sign", "-f", str(key), "-n", NAMESPACE, str(path))
    if done.returncode:
        do = "name a private key of ssh-keygen, or the public one whose private part ssh-agent holds"
        raise SettingError(f"{key} cannot sign ({_said(done)}); {do}")
    return signature


def check_signature(path: Path, signers: Path) -> str:
    """Who of `signers` signed the file.

    Raises:
        SettingError: no such file of signers, or no ssh-keygen.
        BundleError: not signed, by nobody of these, or changed since.
    """
    if not signers.is_file():
        raise SettingError(
            f"{signers} does not exist; give a file with the allowed signers, as in ssh's allowed_signers"
        )
    if signers.read_bytes().startswith((b"ssh-", b"ecdsa-", b"sk-")):
        line = f'echo "me namespaces=\\"{NAMESPACE}\\" $(cat {shlex.quote(str(signers))})"'
        raise SettingError(f"{signers} is a public key, not a list of who may sign; make one: {line} > signers")
    signature = path.with_name(path.name + SUFFIX)
    if not path.is_file():
        raise BundleError(f"{path} is missing, so there is no signature; get a signed bundle, or leave --signers out")
    if not signature.is_file():
        raise BundleError(
            f"{path} is not signed: {signature.name} is missing; get a signed bundle, or leave --signers out"
        )
    found = _ssh_keygen("find-principals", "-s", str(signature), "-f", str(signers))
    who = found.stdout.decode(errors="replace").splitlines()
    if found.returncode or not who:
        raise BundleError(f"{path} is not signed by anyone in {signers}; do not use it")
    with path.open("rb") as f:
        done = _ssh_keygen(
            "verify", "-f", str(signers), "-I", who[0], "-n", NAMESPACE, "-s", str(signature), stdin=f.read()
        )
    if done.returncode:
        but = f"or {signers} allows other namespaces than {NAMESPACE!r}"
        raise BundleError(f"{path} does not match {who[0]}'s signature, {but} ({_said(done)}); do not use it")
    return who[0]


def _ssh_keygen(action: str, *words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", "-Y", action, *words], input=stdin, capture_output=True, check=False)  # noqa: S603, S607
    except FileNotFoundError as e:
        raise SettingError("signatures need ssh-keygen; install it with: sudo apt install openssh-client") from e


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "ssh-keygen says nothing"
