"""The layout of dense logits as a table: which rows its positions are, against plain indexing.

  Run: make test ARGS=tests/backends/triton/test_layout.py

Not here: the backend that reads through it (tests/backends/triton/test_backend.py).
"""

import pytest
import torch

from opd_ops.backends.triton.layout import Layout

BASE = torch.arange(4.0 * 6 * 5).view(4, 6, 5)

LAYOUTS = {
    "contiguous": lambda x: x,
    "one dimension": lambda x: x[1, 2],
    "two dimensions": lambda x: x[1],
    "shifted": lambda x: x[:, :-1],
    "later half": lambda x: x[:, 3:],
    "every second": lambda x: x[::2, ::3],
    "transposed": lambda x: x.transpose(0, 1),
    "fewer entries": lambda x: x[..., :3],
    "one of each": lambda x: x[2:3, :, None],
    "four dimensions": lambda x: x.view(2, 2, 6, 5)[:, :, :-1],
    "one position": lambda x: x[2:3, 4:5, 1:],
    "none": lambda x: x[:, :0],
    "one entry": lambda x: x[..., 2:3],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_finds_every_position(name):
    logits = LAYOUTS[name](BASE)
    layout = Layout.of(logits)
    table, positions = layout.table(logits), torch.arange(logits.shape[:-1].numel())
    assert torch.equal(table[layout.rows(positions)], logits.reshape(-1, logits.shape[-1]))
    assert table.untyped_storage().data_ptr() == BASE.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", LAYOUTS)
def test_empty_gives_a_gradient_of_the_same_positions(name):
    logits = LAYOUTS[name](BASE)
    layout = Layout.of(logits)
    table, gradient = layout.empty(logits)
    positions = torch.arange(logits.shape[:-1].numel())
    table[layout.rows(positions)] = logits.reshape(-1, logits.shape[-1])
    assert torch.equal(gradient, logits)
    assert gradient.is_contiguous() == (name not in ("shifted", "later half", "every second", "transposed", "four dimensions"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_kept_rows_are_those_given_and_with_gaps_those_of_no_position(name):
    logits = LAYOUTS[name](BASE)
    layout, n = Layout.of(logits), logits.shape[:-1].numel()
    positions = layout.rows(torch.arange(n))
    rows = positions[n // 2 :: 2]
    assert layout.kept(rows, gaps=False).nonzero().flatten().tolist() == sorted(rows.tolist())
    others = set(range(layout.n_rows)) - set(positions.tolist())
    assert set(layout.kept(rows, gaps=True).nonzero().flatten().tolist()) == others | set(rows.tolist())


def test_rows_of_logits_in_order_are_the_positions_themselves():
    positions = torch.arange(24)
    assert Layout.of(BASE).rows(positions) is positions
    assert Layout.of(BASE.transpose(0, 1)).rows(positions) is not positions


@pytest.mark.parametrize(
    "logits",
    [
        BASE.transpose(1, 2),
        BASE[..., ::2],
        BASE[:1].expand(4, 6, 5),
        BASE[:1, :1].expand(4, 6, 5),
        BASE.as_strided((3, 4, 5), (7, 5, 1)),
        BASE.as_strided((3, 5), (4, 1)),
    ],
    ids=["vocabulary not last", "entries apart", "expanded", "expanded twice", "overlapping", "overlapping rows"],
)
def test_a_layout_rejects_strided_entries_and_shared_memory(logits):
    assert Layout.of(logits) is None
