"""The embedding table looked up in integers, and multiplied with by a tied head."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import model_of, run, stored
from lfm_quantize.passes.integers import TABLE, Integers, Product
from lfm_quantize.passes.nodes import rewritten
from lfm_quantize.passes.table import QuantizedTable
from lfm_quantize.rounding import Precision, clipped

TABLE_OF = np.random.default_rng(0).standard_normal((33, 192)).astype(np.float32)  # 33 rows of 3 blocks of 64


@pytest.mark.parametrize(
    "precision", [Precision(8), Precision(4, 32), Precision(4, 32, zero_points=True), Precision(4, 64)], ids=str
)
def test_both_forms_of_the_table_are_the_same_numbers_from_the_same_bytes(precision) -> None:
    rounded = clipped(TABLE_OF, precision, None)
    embed = model_of("e (int64[1, n] ids) => (float[1, n, 192] y) { [look_up] y = Gather (t, ids) }", t=TABLE_OF)
    result = QuantizedTable(rounded)(embed)
    assert result.modified
    assert "t" not in result.model.graph.initializers
    ids = np.array([[0, 32, 5, 5]])
    (got,) = run(result.model, ids=ids)
    np.testing.assert_allclose(got[0], rounded.weight()[ids[0]], rtol=1e-6, atol=1e-7)

    text = "h (float[rows, 192] x) => (float[rows, 33] y) { [head] y = MatMul (x, w) }"
    plain = model_of(text, w=np.ascontiguousarray(TABLE_OF.T))
    head = rewritten(plain, Integers({"head": Product(rounded)}, tied=True))
    shared = [name for name in result.model.graph.initializers if name in head.graph.initializers]
    assert any("weight" in name for name in shared)
    assert all(name.startswith(TABLE) for name in shared)
    for name in shared:
        assert stored(result.model, name) == stored(head, name)
    x = np.random.default_rng(6).standard_normal((4, 192)).astype(np.float32)
    wanted = x @ rounded.weight().T
    assert np.abs(run(head, x=x)[0] - wanted).max() < 0.02 * np.abs(wanted).max()
