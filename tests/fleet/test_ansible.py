"""The collection lfm_edge.fleet on boards with real systemd and sshd: each ends with the old or the new version, and says why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from boards import Board, Fleet, Played, pythons, why_not

pytest.importorskip("ansible", reason="Ansible is not installed")
pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(why_not()), reason=why_not() or "boards can be made")]
OURS, ANOTHER = pythons()
NAME = "Hof cäm"
ROOM = 1500
"""MiB of a disk that holds three versions and a stick."""


def made(bundle: Path, stick: Path, *words: str) -> Path:
    """A stick for these boards, as the command makes it."""
    command = [sys.executable, "-m", "lfm_runtime", "stick", str(bundle), "--target", "x86_64", "--variant", "fp32"]
    version = f"3.{sys.version_info.minor}"
    subprocess.run([*command, "--python", version, *words, "-o", str(stick)], check=True, capture_output=True)
    return stick


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """A folder with a key to sign sticks with, and the file of allowed signers."""
    folder = tmp_path_factory.mktemp("keys")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "release"], check=True)
    public = (folder / "release.pub").read_text().split()
    (folder / "signers").write_text(f'us@example.com namespaces="lfm-edge" {public[0]} {public[1]}\n')
    return folder


@pytest.fixture(scope="module")
def with_server(demo_bundle, tmp_path_factory, keys) -> Path:
    return made(
        demo_bundle, tmp_path_factory.mktemp("a") / f"{NAME}.tar", "--extra", "serve", "--sign", str(keys / "release")
    )


@pytest.fixture(scope="module")
def place(worker_id) -> int:
    """A number that no other process of this run has."""
    return 1 + int(worker_id.removeprefix("gw")) if worker_id != "master" else 99


@pytest.fixture
def fleet(tmp_path, place):
    """No board yet."""
    found = Fleet(tmp_path, place)
    yield found
    found.end()


@pytest.fixture(scope="module")
def serving(tmp_path_factory, with_server, keys, place):
    """A fleet of one board, `cam`, on which the stick with the server is installed, signed, and serves."""
    fleet = Fleet(tmp_path_factory.mktemp("serving"), 100 + place)
    board = fleet.add("cam", OURS, mib=ROOM)
    played = fleet.play("install", install_stick=str(with_server), install_signers=str(keys / "signers"))
    assert played.of("cam")["failed"] == 0, played.text
    (fleet.folder / "clients").write_text("a-key-of-a-client\n")
    played = fleet.play("serve", serve_listen=f"{board.address}:8080", serve_keys_file="clients")
    assert played.of("cam")["failed"] == 0, played.text
    yield fleet
    fleet.end()


def answers(board: Board) -> bool:
    """Whether its server lists its model to a client with the key."""
    url = f"http://{board.address}:8080/v1/models"
    request = urllib.request.Request(url, headers={"Authorization": "Bearer a-key-of-a-client"})
    for _ in range(200):  # it starts at the first connection
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(request) as answer:
            return bool(json.load(answer)["data"])
        time.sleep(0.1)
    return False


def version_of(fleet: Fleet, name: str) -> str:
    return fleet.boards[name].ssh("readlink /opt/lfm-edge/current || true").removeprefix("versions/")


def test_ansible_lint_has_nothing_to_say(tmp_path) -> None:
    """Its production profile, over what users install."""
    if not shutil.which("ansible-lint", path=str(Path(sys.executable).parent)):
        pytest.skip("ansible-lint is not installed")
    fleet = Fleet(tmp_path, 1)
    words = [
        str(Path(sys.executable).parent / "ansible-lint"),
        "--offline",
        "--profile",
        "production",
        "--nocolor",
        ".",
    ]
    folder = tmp_path / "collections" / "ansible_collections" / "lfm_edge" / "fleet"
    done = subprocess.run(words, cwd=folder, env=fleet.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Profile 'production' was required, and it passed" in done.stdout + done.stderr


def test_units_are_those_of_the_server() -> None:
    """The collection carries copies, since it is installed alone."""
    root = Path(__file__).resolve().parents[2]
    for name in ("lfm-edge-serve.service", "lfm-edge-serve.socket"):
        copy = root / "fleet" / "ansible" / "roles" / "serve" / "files" / name
        assert copy.read_text() == (root / "serve" / "examples" / name).read_text()


STICK_SH = Path(__file__).resolve().parents[2] / "fleet" / "ansible" / "roles" / "install" / "files" / "stick.sh"


@pytest.fixture
def checked(tmp_path, keys):
    """What stick.sh says of a stick that must be signed: its exit code, and a line."""
    numbers = iter(range(100))

    def run(stick: Path) -> tuple[int, str]:
        words = ["sh", str(STICK_SH), str(stick), str(tmp_path / f"place{next(numbers)}"), str(keys / "signers")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, (done.stderr or done.stdout).strip()

    return run


def test_forged_sticks(with_server, stick_once, checked, demo_bundle, keys, tmp_path) -> None:
    """Nothing is carried but what a signer has signed."""
    code, said = checked(with_server)
    assert code == 0 and said.startswith(f"{NAME}-"), said
    files = tmp_path / "files"
    files.mkdir()
    subprocess.run(["tar", "-xf", with_server, "-C", files], check=True)
    assert checked(files / NAME) == (0, said), "a folder is as good as a tar"
    assert checked(Path(shutil.copy(with_server, tmp_path / "of-november.tar"))) == (0, said)

    code, said = checked(stick_once)
    assert code == 2 and "is not signed" in said
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "install.sh").write_text("echo forged")
    more = Path(shutil.copy(with_server, tmp_path / "more.tar"))
    subprocess.run(["tar", "-rf", more, "-C", tmp_path, "more"], check=True)
    code, said = checked(more)
    assert code == 2 and "is damaged" in said, "its install.sh is another"

    words = [str(demo_bundle), "--variant", "fp32", "--sign", str(keys / "release"), "-o", str(tmp_path / "bundle.tar")]
    subprocess.run([sys.executable, "-m", "lfm_runtime", "pack", *words], check=True, capture_output=True)
    subprocess.run(["tar", "-xf", tmp_path / "bundle.tar", "-C", tmp_path], check=True)
    for name in ("install.sh", "stick.conf"):
        shutil.copy(files / NAME / name, tmp_path / "bundle")
    code, said = checked(tmp_path / "bundle")
    assert code == 2 and "does not name install.sh" in said, "what is signed is a bundle"
    (files / NAME / "install.sh").write_text("echo forged")
    code, said = checked(files / NAME)
    assert code == 2 and "is damaged" in said
    code, said = checked(tmp_path / "more")
    assert code == 2 and "is no stick" in said


@pytest.mark.skipif(not ANOTHER, reason="there is no second Python here")
def test_a_good_board_a_full_one_and_one_with_another_python(fleet, with_server, keys, photo, demo_model) -> None:
    good = fleet.add("good", OURS, mib=ROOM)
    fleet.add("full", OURS, mib=60)
    fleet.add("other", ANOTHER)
    stick = {"install_stick": str(with_server), "install_signers": str(keys / "signers")}

    played = fleet.play("install", "--check", **stick)
    assert played.of("good")["changed"] and not played.of("good")["failed"], played.text
    assert good.ssh("ls /opt") == "", "check mode changes nothing"

    played = fleet.play("install", **stick)
    assert played.of("good")["failed"] == 0, played.text
    assert "MiB free" in played.last("full") and "installed now: nothing" in played.last("full")
    assert "this stick is for Python" in played.last("other") and "installed now: nothing" in played.last("other")
    assert [version_of(fleet, name) for name in ("full", "other")] == ["", ""]
    assert version_of(fleet, "good").startswith(f"{NAME}-")
    assert good.ssh("ls /opt") == "lfm-edge", "the stick that was carried is gone"
    asked = "cat > p.jpg; /opt/lfm-edge/bin/lfm-edge run /opt/lfm-edge/current/bundle p.jpg -p Hi --max-new-tokens 4 --temperature 0"
    wanted = demo_model.answer([photo], "Hi", temperature=0, max_new_tokens=4).text().strip()
    assert good.ssh(asked, given=photo.read_bytes()) == wanted
    assert fleet.play("install", "--limit", "good", **stick).of("good")["changed"] == 0

    assert fleet.play("serve", "--check", serve_listen=f"{good.address}:8080").of("good")["failed"] == 0
    played = fleet.play("serve", serve_listen=f"{good.address}:8080")
    assert played.of("good")["failed"] == 0, played.text
    assert "nothing is installed in /opt/lfm-edge; install first" in played.last("full")
    assert answers(good)


@pytest.mark.slow
def test_serving_and_settings(serving) -> None:
    """Clients with a key are served; a second run changes nothing; settings that cannot be leave a reason, and those of
    before.
    """
    address = serving.boards["cam"].address
    assert "nothing is installed" not in serving.play("doctor").text
    settings = {"serve_listen": f"{address}:8080", "serve_keys_file": "clients"}
    assert answers(serving.boards["cam"])
    assert serving.play("serve", **settings).of("cam")["changed"] == 0
    assert "is no address and port" in serving.play("serve", serve_listen="cam.local:8080").last("cam")
    assert answers(serving.boards["cam"]), "nothing was changed"
    assert "is open to other machines: give keys" in serving.play("serve", serve_listen="0.0.0.0:8080").last("cam")
    played = serving.play("serve", **settings, serve_arguments=["--context", "100000000"])
    assert "does not answer" in played.last("cam") and "--context 100000000 is impossible" in played.last("cam")
    assert "it serves with its settings of before again" in played.last("cam")
    assert answers(serving.boards["cam"])
    played = serving.play("serve", serve_listen="203.0.113.9:8080", serve_keys_file="clients")  # not its address
    assert "does not answer at 203.0.113.9:8080" in played.last("cam")
    assert answers(serving.boards["cam"]), "with the settings of before"
    assert serving.play("serve", **settings).of("cam")["changed"] == 0
    assert serving.play("serve", **settings, serve_arguments=["--name", 'a "$b" 100%']).of("cam")["failed"] == 0
    assert answers(serving.boards["cam"])


@pytest.mark.slow
def test_a_profile_for_every_version(serving, tmp_path) -> None:
    board = serving.boards["cam"]
    (tmp_path / "one.toml").write_text("threads = 1\n")
    (tmp_path / "bad.toml").write_text('threads = "many"\n')
    assert serving.play("profile", profile_file=str(tmp_path / "one.toml")).of("cam")["changed"]
    played = serving.play("profile", profile_file=str(tmp_path / "bad.toml"))
    assert "threads = 'many' is impossible" in played.last("cam")
    assert board.ssh("cat /opt/lfm-edge/profile.toml") == "threads = 1"
    assert serving.play("profile", profile_file=str(tmp_path / "one.toml")).of("cam")["changed"] == 0
    assert " 1 thread, profile " in board.ssh("/opt/lfm-edge/bin/lfm-edge run /opt/lfm-edge/current/bundle -p Hi 2>&1")
    assert serving.play("profile").of("cam")["changed"]
    assert answers(serving.boards["cam"])


@pytest.mark.slow
def test_audits_refuse_or_drain(serving) -> None:
    """Its file and a report are here; the board serves again."""
    assert answers(serving.boards["cam"])
    assert "it serves, and would measure its clients as well" in serving.play("audit").last("cam")
    played = serving.play("audit", audit_drain=True, audit_arguments=["--budget", "8s"], audit_report=_ours())
    assert played.of("cam")["failed"] == 0, played.text
    assert json.loads((serving.folder / "audits" / "cam.json").read_text())["variants"]["fp32"]
    assert "<html" in (serving.folder / "audits" / "report.html").read_text()
    assert serving.boards["cam"].ssh("systemctl is-active lfm-edge-serve.service") == "active"
    assert answers(serving.boards["cam"])


def _ours() -> str:
    return str(Path(sys.executable).parent / "lfm-edge")


@pytest.mark.slow
def test_a_version_that_cannot_serve_goes_back(serving, with_server, demo_bundle, keys, tmp_path) -> None:
    """It passes its selftest and becomes current, but the service does not start with it."""
    before = version_of(serving, "cam")
    unsigned = made(demo_bundle, tmp_path / "unsigned")
    assert (
        "the stick is not signed"
        in serving.play("install", install_stick=str(unsigned), install_signers=str(keys / "signers")).text
    )
    without = made(demo_bundle, tmp_path / "without", "--sign", str(keys / "release"))
    played = serving.play("install", install_stick=str(without), install_signers=str(keys / "signers"))
    assert "lfm-edge-serve.service does not start: lfm-edge" in played.last("cam")
    assert f"installed now: {before}" in played.last("cam")
    assert version_of(serving, "cam") == before
    assert answers(serving.boards["cam"])

    place = "/etc/systemd/system/lfm-edge-serve.service.d/zz.conf"
    cam = serving.boards["cam"]
    cam.ssh(
        f"printf '[Service]\\nExecStart=\\nExecStart=/bin/false\\n' | sudo tee {place} && sudo systemctl daemon-reload"
    )
    played = serving.play("install", install_stick=str(without), install_signers=str(keys / "signers"))
    assert f"installed now: {before}, with which the service does not start either" in played.last("cam")
    cam.ssh(f"sudo rm {place} && sudo systemctl daemon-reload && sudo systemctl reset-failed")
    assert (
        serving.play("install", install_stick=str(with_server), install_signers=str(keys / "signers")).of("cam")[
            "failed"
        ]
        == 0
    )
    cam.ssh("sudo systemctl start lfm-edge-serve.socket")
    assert answers(cam)


def broken(board: Board, process: subprocess.Popen) -> None:
    """Break the connections of a board until a playbook ends: between two tasks Ansible connects again."""
    while process.poll() is None:
        board.hang_up()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_connection_that_breaks(fleet, stick_once, tmp_path) -> None:
    """While the stick is carried, and while it is installed: the old version, or none; then the new one."""
    from sticks import another

    board = fleet.add("far", OURS, mib=ROOM)
    first = fleet.start("install", install_stick=str(stick_once))
    while not board.ssh("ls -d /opt/lfm-edge.stick 2>/dev/null || true"):
        time.sleep(0.1)
    broken(board, first)
    assert Played(first.communicate()[0]).of("far")["unreachable"] == 1
    assert version_of(fleet, "far") == ""
    played = fleet.play("install", install_stick=str(stick_once))
    assert played.of("far")["failed"] == 0, played.text
    old = version_of(fleet, "far")

    newer = Path(shutil.copytree(stick_once, tmp_path / "newer"))
    another(newer, name="newer")
    second = fleet.start("install", install_stick=str(newer))
    while not board.ssh("ls -d /opt/lfm-edge/versions/newer-*/venv 2>/dev/null || true"):
        time.sleep(0.1)
    broken(board, second)
    assert Played(second.communicate()[0]).of("far")["unreachable"] == 1
    assert version_of(fleet, "far") in (old, next(iter(board.ssh("ls /opt/lfm-edge/versions | grep newer").split())))
    played = fleet.play("install", install_stick=str(newer))
    assert played.of("far")["failed"] == 0, played.text
    assert version_of(fleet, "far").startswith("newer-")
    assert fleet.play("install", install_stick=str(newer)).of("far")["changed"] == 0


@pytest.mark.slow
def test_a_selftest_that_fails_and_a_stick_for_each_board(fleet, stick_once, demo_bundle, tmp_path) -> None:
    """The stick of one board has golden values that no processor gives; the other board has a stick of its own."""
    fleet.add("good", OURS, mib=ROOM)
    fleet.add("bad", OURS, mib=ROOM)
    bundle = Path(shutil.copytree(demo_bundle, tmp_path / "wrong"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["golden"]["fp32"]["prompt"][0] += 1
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    sticks = {"good": stick_once, "bad": made(bundle, tmp_path / "other")}
    (fleet.folder / "host_vars").mkdir()
    for name, stick in sticks.items():
        (fleet.folder / "host_vars" / f"{name}.yml").write_text(f"install_stick: {stick}\n")
    played = fleet.play("install")
    assert played.of("good")["failed"] == 0, played.text
    assert version_of(fleet, "good").startswith("cam-")
    assert "failed: FAILED   golden values" in played.last("bad") and "installed now: nothing" in played.last("bad")
    assert version_of(fleet, "bad") == ""
    assert fleet.play("install", "--limit", "good").of("good")["changed"] == 0


@pytest.mark.slow
def test_an_audit_of_boards_that_fail(serving) -> None:
    """One whose connection breaks in the middle, one without a Python, one that is away: the others' reasons are said."""
    cam = serving.boards["cam"]
    inventory = yaml.safe_load((serving.folder / "inventory.yml").read_text())
    hosts = inventory["all"]["hosts"]
    hosts["away"] = {"ansible_host": "127.77.254.254"}
    hosts["broken"] = {**hosts["cam"], "ansible_python_interpreter": "/nope"}
    (serving.folder / "inventory.yml").write_text(yaml.safe_dump(inventory))
    assert answers(cam)
    settings = {"audit_drain": True, "audit_arguments": ["--budget", "8s"], "audit_report": _ours()}
    played = serving.play("audit", **settings)
    assert played.of("cam")["failed"] == 0, played.text
    assert "it was not reached" in played.last("away")
    assert "broken: " in played.last("broken")
    assert answers(cam)

    (serving.folder / "audits" / "cam.json").unlink()
    running = serving.start("audit", **settings)
    while cam.ssh("systemctl is-active lfm-edge-serve.service", check=False) == "active":
        time.sleep(0.1)
    cam.hang_up()
    played = Played(running.communicate()[0])
    assert played.of("cam")["failed"] == 1 and "not to the end" in played.last("cam"), played.text
    assert not (serving.folder / "audits" / "cam.json").exists()
    while cam.ssh("systemctl is-active lfm-edge-serve.socket", check=False) != "active":
        time.sleep(0.1)
    assert answers(cam)
