"""Gradients of a loss whose logit gradient is zero except at a few ids of each row: only these columns are multiplied.

  dhidden = D W_U,  dweight_U = D^T hidden,  U the ids of all rows, D (M, U) the logit gradient at U

This takes U / V of the dense matmuls, and, unlike a scatter into the weight's gradient, sums in a fixed order.
Host synchronisation: one, for the number of ids.
Not here: gradients over whole rows (streamed/loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Source, compute_dtype, coordinates, put_rows, take_rows
from opd_ops.inputs.workspace import Workspace


def listed_gradients(
    student: Source, rows: Tensor, ids: Tensor, values: Tensor, needs: Sequence[bool], workspace: Workspace
) -> list[Tensor | None]:
    """Gradients of the student's tensors, in their dtypes; None if not needed.

    Args:
        ids, values: (M, K) ids, and the gradient of the raw logits there. Ids outside this rank's part of the vocabulary are
            missing.
    """
    shard = student.transform.shard
    ids = ids - student.transform.first_id
    missing = (ids < 0) | (ids >= student.transform.vocab_size)
    ids, values = ids.masked_fill(missing, 0), values.masked_fill(missing, 0)  # a missing id adds 0 to column 0
    if student.weight is None:
        dense = torch.zeros_like(student.leading)
        if not student.transform.vocab_size:
            return [dense]
        positions = (x.unsqueeze(1) for x in coordinates(rows, student.leading.shape[:-1]))
        return [dense.index_put_((*positions, ids), values.to(dense.dtype), accumulate=True)]
    dtype, width = compute_dtype(student), student.leading.shape[-1]
    used = torch.unique(ids) if student.transform.vocab_size else ids.new_empty(0)
    dleading = torch.zeros_like(student.leading) if needs[0] else None
    dweight = torch.zeros_like(student.weight) if needs[1] else None
    dbias = None if student.bias is None else torch.zeros_like(student.bias)
    sums = torch.zeros(len(rows), width, dtype=dtype, device=rows.device) if needs[0] else None
    # A quarter of the workspace each: rows of the weight with their gradient, hidden rows, the logit gradient.
    quarter = workspace.share(1, 4)
    n_columns = quarter.count(2 * width * dtype.itemsize)
    n_rows = min(n_columns, quarter.count(n_columns * dtype.itemsize))
    for part in chunks(len(used), n_columns):
        columns = used[part]
        weight = student.weight[columns].to(dtype)
        total, total_bias = torch.zeros_like(weight), weight.new_zeros(len(columns))
        for group in chunks(len(rows), n_rows):
            places = torch.searchsorted(columns, ids[group]).clamp_max(len(columns) - 1)
            in_part = columns[places] == ids[group]
            dlogits = weight.new_zeros(len(places), len(columns))
            dlogits.scatter_add_(1, places, values[group].to(dtype).masked_fill(~in_part, 0))
            if sums is not None:
                sums[group] += dlogits @ weight
            if dweight is not None:
                total += dlogits.T @ take_rows(student.leading, rows[group]).to(dtype)
            total_bias += dlogits.sum(0)
        if dweight is not None:
            dweight[columns] = total.to(dweight.dtype)
        if dbias is not None:
            dbias[columns] = total_bias.to(dbias.dtype)
    if dleading is not None and sums is not None:
        if shard is not None:
            shard.ranks.sum(sums)
        put_rows(dleading, rows, sums)
    return [dleading, dweight] if student.bias is None else [dleading, dweight, dbias]
