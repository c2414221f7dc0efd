"""`lfm-edge caption` on a Dask cluster: the same records as one process, whatever happens to workers and scheduler."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading

import psutil
import pytest
from clusters import PATIENCE_S, Cluster, start, texts, until
from lfm_runtime.commands.cli import main
from pictures import IMAGES


def many(folder, count: int) -> None:
    for n in range(count):
        shutil.copy(IMAGES[n % len(IMAGES)], folder / f"more-{n:05}.png")


def lines(out) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def test_processes_of_this_machine_give_the_records_of_one(command, tmp_path) -> None:
    assert main(command()) == 0
    assert main(command("--workers", "2", out="two.jsonl")) == 0
    assert texts(tmp_path / "two.jsonl") == texts(tmp_path / "out.jsonl")
    record = json.loads((tmp_path / "two.jsonl").read_text().splitlines()[0])
    assert list(record)[-1] == "worker"
    assert set(record["worker"]) == {"host", "name", "profile", "threads", "rows", "lfm_edge", "onnxruntime"}
    assert record["worker"]["threads"] == 1


def test_a_run_of_one_process_goes_on_on_a_cluster(command, folder, tmp_path, capsys) -> None:
    """And what has changed since is done again there."""
    assert main(command()) == 0
    shutil.copy(IMAGES[20], folder)
    os.utime(folder / IMAGES[0].name, (1, 1))
    before = texts(tmp_path / "out.jsonl")
    assert main([word for word in command("--workers", "1") if word != "--quiet"]) == 0
    assert "2 answered, 11 there already" in capsys.readouterr().err
    after = texts(tmp_path / "out.jsonl")
    assert after.pop(f"images/{IMAGES[20].name}")
    assert after == before


def test_choices_and_errors_of_images(command, folder, tmp_path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG nothing more")
    (folder / "0000-gone.png").symlink_to("nowhere")  # the first one, by which workers tell whether they see images
    assert main(command("--choices", "one,two", "--workers", "1")) == 3
    assert main(command("--choices", "one,two", out="alone.jsonl")) == 3
    assert texts(tmp_path / "out.jsonl") == texts(tmp_path / "alone.jsonl")
    assert sum(text.startswith("error: ") for text in texts(tmp_path / "out.jsonl").values()) == 2


def _chaos(command, folder, tmp_path, images: int, kill_every: float | None) -> None:
    many(folder, images)
    out = tmp_path / "out.jsonl"
    with Cluster(tmp_path) as cluster:
        for name in "abc":
            cluster.work(name, nanny=True)
        run = start(command("--scheduler", cluster.address))
        over = threading.Event()

        def kill() -> None:
            """A worker's process, not its nanny, which starts another one."""
            nannies = [psutil.Process(worker.pid) for worker in cluster.workers if worker.poll() is None]
            found = [c for n in nannies for c in n.children() if "resource_tracker" not in " ".join(c.cmdline())]
            if found:
                found[lines(out) % len(found)].send_signal(signal.SIGKILL)

        def keep_killing() -> None:
            while kill_every and not over.wait(kill_every):
                kill()

        killer = threading.Thread(target=keep_killing)
        killer.start()
        until(lambda: lines(out) > images // 8 or run.poll() is not None)
        kill()
        until(lambda: lines(out) > images // 3 or run.poll() is not None)
        assert run.poll() is None, run.communicate()
        cluster.restart_scheduler()
        for name in "def":  # the others have left with their scheduler
            cluster.work(name, nanny=True)
        said = run.communicate(timeout=None if kill_every else 2 * PATIENCE_S)[1]
        over.set()
        killer.join()
        assert run.returncode == 0, said
    assert "the scheduler is back" in said
    assert main(command(out="alone.jsonl")) == 0
    found = texts(out)
    assert found == texts(tmp_path / "alone.jsonl")
    assert len(found) == images + 12


def test_a_worker_is_killed_and_the_scheduler_started_again(command, folder, tmp_path) -> None:
    _chaos(command, folder, tmp_path, 300, None)


@pytest.mark.slow
def test_2_000_images_and_a_worker_killed_every_10_s(command, folder, tmp_path) -> None:
    _chaos(command, folder, tmp_path, 1_988, 10.0)


def test_ctrl_c_ends_after_the_batches_that_are_there(command, folder, tmp_path) -> None:
    many(folder, 600)
    out = tmp_path / "out.jsonl"
    run = start(command("--workers", "1"), start_new_session=True)
    until(lambda: lines(out) or run.poll() is not None)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    said = run.communicate(timeout=PATIENCE_S)[1]
    assert run.returncode == 130, said
    assert "Traceback" not in said
    before = lines(out)
    assert 0 < before < 612
    assert main(command()) == 0
    assert len(texts(out)) == 612


@pytest.mark.slow
def test_an_image_that_workers_die_of_is_an_error(command, folder, tmp_path) -> None:
    """The others of its batch are answered about."""
    dies = """
import os, signal
import lfm_fleet.worker as worker
read = worker.read_image
def read_image(model, path, *rest, **more):
    if path.endswith("poison.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(model, path, *rest, **more)
worker.read_image = read_image
"""
    shutil.copy(IMAGES[30], folder / "poison.png")
    with Cluster(tmp_path) as cluster:
        cluster.work("a", before=dies, nanny=True)  # the others wait there with it
        run = start(command("--scheduler", cluster.address))
        said = run.communicate(timeout=2 * PATIENCE_S)[1]
        assert run.returncode == 3, said
    found = texts(tmp_path / "out.jsonl")
    assert found["images/poison.png"] == "error: workers ended while they had it, also where they had nothing else"
    assert sum(text.startswith("error") for text in found.values()) == 1
    assert len(found) == 13


def test_where_nothing_is_missing_no_cluster_is_asked(command, tmp_path) -> None:
    assert main(command("--workers", "1")) == 0
    before = texts(tmp_path / "out.jsonl")
    assert main(command("--scheduler", "tcp://127.0.0.1:1")) == 0
    assert texts(tmp_path / "out.jsonl") == before
