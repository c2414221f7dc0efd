"""lfm_fleet in programs that use Dask themselves: a client, a bag, a dataframe."""

from __future__ import annotations

import pickle

import dask.bag
import pytest
from clusters import Cluster
from distributed import Client
from lfm_fleet import caption, captioner
from pictures import IMAGES, QUESTION


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.work("a")
        with Client(cluster.address) as client:
            yield client


@pytest.fixture
def wanted(demo_model) -> list[str]:
    return [demo_model.answer(path, QUESTION, temperature=0).text() for path in IMAGES[:6]]


def test_records_from_a_client(client, demo_bundle, wanted) -> None:
    found = {r["path"]: r["text"] for r in caption(client, IMAGES[:6], demo_bundle, QUESTION, threads=1)}
    assert found == dict(zip(map(str, IMAGES[:6]), wanted, strict=True))


def test_a_bag(client, demo_bundle, wanted) -> None:
    ask = captioner(demo_bundle, QUESTION, threads=1)
    bag = dask.bag.from_sequence(map(str, IMAGES[:6]), npartitions=2).map_partitions(ask)
    assert [record["text"] for record in bag.compute(scheduler=client)] == wanted


def test_a_column_of_a_dataframe(client, demo_bundle, wanted) -> None:
    pd = pytest.importorskip("pandas")
    dd = pytest.importorskip("dask.dataframe")
    ask = captioner(demo_bundle, QUESTION, threads=1)
    frame = dd.from_pandas(pd.DataFrame({"path": list(map(str, IMAGES[:6]))}), npartitions=3)

    def asked(part):
        return part.assign(text=[record["text"] for record in ask(part["path"])])

    frame = frame.map_partitions(asked, meta={"path": str, "text": str})
    assert client.compute(frame).result()["text"].tolist() == wanted


def test_without_a_cluster(demo_bundle, wanted) -> None:
    """A captioner is a function; it can be sent anywhere."""
    ask = pickle.loads(pickle.dumps(captioner(demo_bundle, QUESTION, threads=1)))
    records = ask([*map(str, IMAGES[:6]), "/nowhere.png"])
    assert [record.get("text") for record in records] == [*wanted, None]
    assert records[-1]["error"] == "cannot be read (No such file or directory)"
    assert records[0]["path"] == str(IMAGES[0])
