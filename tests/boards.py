"""Boards to install on: Debians with systemd and OpenSSH's server, each on an address of its own, as boards.sh makes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

HERE = Path(__file__).parent
COLLECTION = HERE.parent / "fleet" / "ansible"
PORT = 2222
PATIENCE_S = 120  # on a busy machine; nothing is judged by it


def why_not() -> str:
    """Why this machine can have no boards; "" where it can."""
    missing = [name for name in ("systemd-nspawn", "sshd", "sudo", "unshare") if not shutil.which(name, path=_PATH)]
    if missing:
        return f"no {missing[0]} here"
    if os.geteuid() != 0:
        return "boards are made by root"
    code = "mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w /mnt/r && mount -t overlay -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w none /mnt/r"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-c", code], capture_output=True, check=False
    )
    return "" if tried.returncode == 0 else "no namespaces or overlays here"


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def pythons() -> tuple[str, str]:
    """Two Pythons for boards: one of this version, Debian's where there is one, since services see no homes; another."""
    ours = Path(f"/usr/bin/python3.{sys.version_info.minor}")
    found = [*Path("/usr/bin").glob("python3.[0-9]*"), *Path.home().glob(".pyenv/versions/3.1?.*/bin/python3.1?")]
    others = [path for path in found if path.name[8:].isdigit() and int(path.name[8:]) != sys.version_info.minor]
    return str(ours if ours.exists() else Path(sys.executable).resolve()), str(others[-1]) if others else ""


@dataclass
class Board:
    """One board while it runs."""

    name: str
    address: str
    key: Path
    process: subprocess.Popen = field(repr=False)

    def ssh(self, command: str, *, given: bytes = b"", check: bool = True) -> str:
        """What a command of pi's says that is given this."""
        words = ["ssh", "-q", "-p", str(PORT), "-i", str(self.key), "-o", "UserKnownHostsFile=/dev/null"]
        words += ["-o", "StrictHostKeyChecking=no", "-o", "ConnectTimeout=5", f"pi@{self.address}", command]
        return subprocess.run(words, input=given, capture_output=True, check=check).stdout.decode().strip()

    def hang_up(self) -> None:
        """Every connection to it breaks."""
        self.ssh("sudo pkill -9 -f '^sshd: pi'", check=False)


class Fleet:
    """Boards, and Ansible that knows them."""

    def __init__(self, folder: Path, number: int) -> None:
        """`number`: between 1 and 254, which no other fleet of this machine has."""
        self.folder, self.number, self.boards = folder, number, {}
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        words = ["collection", "install", str(COLLECTION), "-p", str(folder / "collections"), "--offline"]
        subprocess.run([_program("ansible-galaxy"), *words], check=True, capture_output=True)

    def add(self, name: str, python: str, *, mib: int = 1000) -> Board:
        """Start a board, and wait until it can be logged in to."""
        address = f"127.77.{self.number}.{len(self.boards) + 1}"
        words = ["sh", str(HERE / "boards.sh"), name, address, str(self.folder / "key.pub"), python, str(mib)]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.boards[name] = board = Board(name, address, self.folder / "key", process)
        patience = time.monotonic() + PATIENCE_S
        while board.ssh("hostname", check=False) != name:
            log = self.folder / f"{name}.log"
            assert process.poll() is None and time.monotonic() < patience, log.read_text(errors="replace")
            time.sleep(0.2)
        hosts = {board.name: {"ansible_host": board.address} for board in self.boards.values()}
        settings = {
            "ansible_port": PORT,
            "ansible_user": "pi",
            "ansible_ssh_private_key_file": str(self.folder / "key"),
            "ansible_ssh_common_args": "-o UserKnownHostsFile=/dev/null -o ConnectTimeout=5",
            "ansible_python_interpreter": "/usr/local/bin/python3",
        }
        (self.folder / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": settings}}))
        return board

    def environment(self) -> dict[str, str]:
        """What Ansible's programs are started with."""
        ours = {
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "collections"),
            "ANSIBLE_HOST_KEY_CHECKING": "False",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_HOME": str(self.folder / "home"),
        }
        return {**os.environ, **ours, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def start(self, playbook: str, *words: str, **settings: object) -> subprocess.Popen:
        """Start a playbook of the collection."""
        said = [
            word
            for name, value in settings.items()
            for word in ("-e", yaml.safe_dump({name: value}, default_flow_style=True))
        ]
        words = (_program("ansible-playbook"), "-i", "inventory.yml", f"lfm_edge.fleet.{playbook}", *said, *words)
        return subprocess.Popen(
            words, cwd=self.folder, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def play(self, playbook: str, *words: str, **settings: object) -> Played:
        """Run a playbook of the collection to its end."""
        return Played(self.start(playbook, *words, **settings).communicate()[0])

    def end(self) -> None:
        """Switch every board off."""
        for board in self.boards.values():
            board.process.kill()
            board.process.wait()


@dataclass
class Played:
    """What a playbook said."""

    text: str

    def of(self, name: str) -> dict[str, int]:
        """The recap of a board: ok, changed, unreachable, failed …"""
        line = next((line for line in self.text.splitlines()[::-1] if line.startswith(f"{name} ")), None)
        assert line, self.text
        return {key: int(value) for key, value in (word.split("=") for word in line.partition(":")[2].split())}

    def last(self, name: str) -> str:
        """The last failure of a board, in Ansible's words."""
        found = [line for line in self.text.splitlines() if line.startswith((f"fatal: [{name}]", f"fatal: [{name} "))]
        assert found, self.text
        return found[-1]


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)
