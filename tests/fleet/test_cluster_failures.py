"""A cluster that cannot do it: one line that says why, exit code 2, and nothing of what is written is lost."""

from __future__ import annotations

import os
import shutil

import pytest
import trustme
from clusters import PATIENCE_S, Cluster, start, texts, until
from distributed import Client
from lfm_fleet import caption
from lfm_fleet.batches import Batches
from lfm_fleet.crew import ClusterError
from lfm_fleet.job import Item
from lfm_fleet.program import captioner
from lfm_runtime.commands.cli import main

NO_EXTRA = "import sys; sys.modules['lfm_fleet'] = None"


def failed(words: list[str], **more) -> str:
    """The line of a run that fails."""
    run = start(words, **more)
    said = run.communicate(timeout=PATIENCE_S)[1]
    assert run.returncode == 2, said
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


def test_a_scheduler_that_is_not_there(command, tmp_path) -> None:
    said = failed(command("--scheduler", "tcp://127.0.0.1:1"))
    assert "the scheduler tcp://127.0.0.1:1 cannot be reached" in said
    assert "start one with: dask scheduler" in said
    assert (tmp_path / "out.jsonl").read_text() == ""


@pytest.mark.parametrize("address", ["http://x", "tcp://x", "10.0.0.2"])
def test_what_is_no_address(command, capsys, address) -> None:
    assert main(command("--scheduler", address)) == 2
    assert f"--scheduler {address} is no address" in capsys.readouterr().err


def test_workers_that_offer_nothing(command, tmp_path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.work("a", offers="")
        said = failed(command("--scheduler", cluster.address))
    assert "none of the 1 workers offers lfm-edge; start some so: dask worker ADDRESS --nthreads 1 --resources" in said


def test_a_worker_without_the_extra(command, tmp_path) -> None:
    """Alone it ends the run; the others do its work."""
    with Cluster(tmp_path) as cluster:
        cluster.work("bare", before=NO_EXTRA)
        assert "its Python lacks lfm-edge with the extra fleet" in failed(command("--scheduler", cluster.address))
        cluster.work("good")
        until(lambda: cluster.has_registered("good"))  # a run that knows the other one alone ends
        run = start(command("--scheduler", cluster.address))
        said = run.communicate(timeout=PATIENCE_S)[1]
        assert run.returncode == 0, said
    assert len(texts(tmp_path / "out.jsonl")) == 12


def test_a_scheduler_without_lfm_edge(command, tmp_path) -> None:
    hidden = """
import importlib.metadata as metadata
there = metadata.version
def version(name):
    if name == "lfm-edge":
        raise metadata.PackageNotFoundError(name)
    return there(name)
metadata.version = version
"""
    with Cluster(tmp_path, before=hidden) as cluster:
        said = failed(command("--scheduler", cluster.address))
    assert f"the Python of the scheduler {cluster.address} lacks lfm-edge" in said


def test_a_model_that_a_workers_memory_cannot_hold(command, tmp_path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.work("small", "--memory-limit", "150MB", nanny=True)
        said = failed(command("--scheduler", cluster.address))
    assert "no worker can do this" in said
    assert "MiB (Dask's memory limit of this worker)" in said


def test_another_bundle_on_a_worker(demo_bundle, folder, tmp_path) -> None:
    job = captioner(demo_bundle, "What?", threads=1).job
    other = type(job)(job.bundle, "0" * 64, job.flags, job.asking, job.settings)
    with Cluster(tmp_path) as cluster, Client(cluster.address) as client:
        cluster.work("a")
        with pytest.raises(ClusterError, match="is another bundle there: its manifest's hash is"):
            list(Batches(client, other, [Item(str(folder / "0001.png"), "0001.png")], print).records())
        elsewhere = type(job)("/nowhere", job.manifest, job.flags, job.asking, job.settings)
        with pytest.raises(ClusterError, match="/nowhere does not exist there; copy it there, or name an URL"):
            list(Batches(client, elsewhere, [Item(str(folder / "0001.png"), "0001.png")], print).records())
        # Who refused a job is asked again by the next one.
        assert len(list(caption(client, [folder / "0001.png"], demo_bundle, "What?", threads=1))) == 1


def test_the_only_worker_leaves_and_another_one_comes(command, folder, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    for n in range(300):
        shutil.copy(folder / "0001.png", folder / f"more-{n}.png")
    with Cluster(tmp_path) as cluster:
        cluster.work("a")
        run = start(command("--scheduler", cluster.address))
        until(lambda: (out.exists() and out.stat().st_size) or run.poll() is not None)
        cluster.workers[0].kill()
        until(lambda: (tmp_path / "out.jsonl").stat().st_size)
        cluster.work("b")
        said = run.communicate(timeout=PATIENCE_S)[1]
        assert run.returncode == 0, said
    assert len(texts(out)) == 312


def test_images_that_a_worker_does_not_see(command, tmp_path) -> None:
    blind = (
        "import os.path; there = os.path.exists; os.path.exists = lambda p: not str(p).endswith('.png') and there(p)"
    )
    with Cluster(tmp_path) as cluster:
        cluster.work("blind", before=blind)
        said = failed(command("--scheduler", cluster.address))
    assert "it does not see" in said
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_a_scheduler_that_goes_and_stays_away(command, folder, tmp_path, demo_bundle) -> None:
    """`Client` gives up after its own time; what is written stays."""
    with Cluster(tmp_path) as cluster, Client(cluster.address, timeout=10) as client:
        cluster.work("a")
        items = [Item(str(path), path.name) for path in sorted(folder.iterdir())]
        batches = Batches(client, captioner(demo_bundle, "What?", threads=1).job, items, print)
        records = batches.records()
        next(records)
        cluster.scheduler.kill()
        with pytest.raises(ClusterError, match="is gone; what is written stays, run again to go on"):
            list(records)


@pytest.fixture
def certificates(tmp_path):
    """Words for Dask's programs, and its configuration for a client, of a new authority."""

    def make(name: str) -> tuple[list[str], dict[str, str]]:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        paths = {kind: str(tmp_path / f"{name}-{kind}.pem") for kind in ("ca", "cert", "key")}
        authority.cert_pem.write_to_path(paths["ca"])
        issued.private_key_pem.write_to_path(paths["key"])
        for blob in issued.cert_chain_pems:
            blob.write_to_path(paths["cert"], append=True)
        words = [
            w
            for option, kind in (("ca-file", "ca"), ("cert", "cert"), ("key", "key"))
            for w in (f"--tls-{option}", paths[kind])
        ]
        tls = "DASK_DISTRIBUTED__COMM__TLS__"
        of_client = {
            f"{tls}CLIENT__KEY": paths["key"],
            f"{tls}CLIENT__CERT": paths["cert"],
            f"{tls}CA_FILE": paths["ca"],
        }
        return words, of_client

    return make


def test_tls(command, tmp_path, certificates) -> None:
    words, ours = certificates("ours")
    _, theirs = certificates("theirs")
    with Cluster(tmp_path, *words) as cluster:
        cluster.work("a", *words)
        run = start(command("--scheduler", cluster.address), env={**os.environ, **ours})
        said = run.communicate(timeout=PATIENCE_S)[1]
        assert run.returncode == 0, said
        assert len(texts(tmp_path / "out.jsonl")) == 12
        shutil.move(tmp_path / "out.jsonl", tmp_path / "kept.jsonl")
        for environment in (theirs, {}):
            said = failed(command("--scheduler", cluster.address), env={**os.environ, **environment})
            assert f"the scheduler {cluster.address} was not reached by TLS" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workers", "0"), "--workers 0 is impossible"),
        (("--workers", "2", "--scheduler", "tcp://x:1"), "exclude each other"),
        (("--workers", "2", "--watch"), "--watch is for one process"),
        (("--workers", "100000"), "ask for fewer"),
    ],
)
def test_words_that_cannot_be(command, capsys, words, said) -> None:
    assert main(command(*words)) == 2
    assert said in capsys.readouterr().err


def test_an_url_needs_a_cluster(command, capsys) -> None:
    assert main(command(images="s3://bucket/images")) == 2
    assert "s3://bucket/images is an URL, which is read on a cluster" in capsys.readouterr().err
