"""The kernels as a repository for Hugging Face's `kernels` library (kernels/write_hub.py), loaded under a name of its own.

  Compared: what the card's example computes, with the installed opd_kernels in the same process, to the bit; the layout.
Run: make test ARGS=tests/kernels/test_hub.py
Not here: whether the kernels are right (test_score.py, test_grad.py).
"""

import re
import sys

import opd_kernels
import pytest
import torch
import write_hub
from opd_kernels.argmax import argmax_fwd
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import score_fwd

from tests.support import kernels as kernels_on_cpu
from tests.support.cases import logit_pair


def card_example(opd, student, teacher):
    """The names that the card's block leaves behind, on the CPU, with these kernels and logits."""
    [block] = re.findall(r"```python\n(.*?)```", (write_hub.HERE / "hub" / "CARD.md").read_text(encoding="utf-8"), re.DOTALL)
    assert 'get_local_kernel(Path("out/hub"))' in block  # no text: the library takes a path alone
    lines = [line for line in block.replace('"cuda"', '"cpu"').splitlines() if "get_local_kernel" not in line]
    drawn = next(i for i, line in enumerate(lines) if line.startswith("student, teacher = "))
    names = {"opd": opd, "student": student, "teacher": teacher}
    exec("\n".join(lines[:drawn] + lines[drawn + 1 :]), names)
    return names


@pytest.mark.full
def test_the_hub_s_kernels_give_the_numbers_of_the_installed_ones(tmp_path, monkeypatch):
    from kernels import get_local_kernel

    monkeypatch.setenv("TRITON_INTERPRET", "1" if kernels_on_cpu.IS_INTERPRETED else "0")  # read at each `triton.jit`
    write_hub.write(tmp_path)
    # The variant's own folder, because the library loads a variant "cuda" by itself only where torch has CUDA.
    hub = get_local_kernel(tmp_path / "build" / "torch-cuda")
    assert hub.score.score_fwd is not score_fwd
    assert sys.modules["opd_kernels"] is opd_kernels
    assert hub.__name__ == hub.score.__name__.rpartition(".")[0] != "opd_kernels"
    assert not {module.__file__ for name, module in sys.modules.items() if name.startswith(f"{hub.__name__}.")} & {
        module.__file__ for name, module in sys.modules.items() if name.startswith("opd_kernels.")
    }

    student, teacher = logit_pair(8, 5003, seed=1)
    student[2, 7] = teacher[3, ::5] = -torch.inf
    names = card_example(hub, student, teacher)
    score = score_fwd(student, teacher, None, **names["logits"])
    assert torch.equal(names["score"].columns, score.columns)
    assert score.reverse_kl[:2].min() > 0
    dlogits = torch.empty_like(student)
    top = argmax_fwd(student, None, score, vocab_size=5003)
    reverse_kl_grad(student, teacher, None, names["weights"], score.columns, top=top, out=dlogits, **names["logits"])
    assert torch.equal(names["dlogits"], dlogits)
    assert dlogits[:2].norm() > 0


def test_what_is_written_depends_on_the_source_alone(tmp_path, monkeypatch):
    write_hub.write(tmp_path)
    stale = tmp_path / "build" / "torch-cuda" / "of_an_older_version.py"
    stale.write_text("")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != stale}
    write_hub.write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert {path.relative_to(tmp_path).parts[0] for path in before} == {"README.md", "build.toml", "build", "torch-ext"}
    assert len(list((tmp_path / "build" / "torch-cuda").glob("*.py"))) == len(
        list((write_hub.HERE / "opd_kernels").glob("*.py"))
    )

    texts = write_hub.sources()
    general = {"name": "opd-kernels", "version": 1, "license": "Apache-2.0"}
    changed = texts | {"score.py": texts["score.py"] + "\n"}
    assert write_hub.metadata(general, "cuda", texts)["id"] != write_hub.metadata(general, "cuda", changed)["id"]


def test_an_import_by_the_package_s_name_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "opd_kernels"
    package.mkdir()
    (package / "__init__.py").write_text('"""x"""')
    (package / "score.py").write_text("from opd_kernels import device\n")
    monkeypatch.setattr(write_hub, "HERE", tmp_path)
    with pytest.raises(ValueError, match=r"opd_kernels/score.py:1: got an import of opd_kernels, expected a relative one"):
        write_hub.sources()
