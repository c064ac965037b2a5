"""The figures of the source's structure: none is worse than its limit, and each counts what its name says.

  Run: make test ARGS=tests/support/test_structure.py

Not here: the figures themselves (`python -m tests.support.structure`).
"""

import json

import pytest

from tests.support import structure
from tests.support.follow import follow
from tests.support.source_tree import Tree


def test_no_figure_is_worse_than_its_limit(capsys):
    assert structure.main(["--limits"]) == 0, capsys.readouterr().err


def test_a_figure_above_its_limit_is_named():
    assert structure.worse({"rooms": 31, "README lines": 3}, {"rooms": 30, "README lines": 3}) == [
        "rooms: 31, at most 30 allowed"
    ]


def test_the_documentations_table_has_these_figures():
    page = (structure.ROOT / "docs/architecture.md").read_text().split("## The structure in figures")[1]
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")][1:-1]  # the last is a time
    figures = {name: measure.value for name, measure in structure.measures().items()}
    expected = [max(figures["circles between modules"], figures["circles between folders"])]
    expected += [max(figures["arrows back up between modules"], figures["arrows back up between folders"])]
    expected += [value for name, value in figures.items() if not name.startswith(("circles", "arrows", "README"))]
    expected[-1:-1] = [f"{figures['README lines']} and {figures['README words']}"]
    assert [row[-1].strip() for row in rows] == [str(value) for value in expected]


def test_json_has_every_figure(capsys):
    structure.main(["--json"])
    table = json.loads(capsys.readouterr().out)
    assert table.keys() == structure.LIMITS.keys()
    assert table["words of a docstring"]["where"][0].startswith(f"{table['words of a docstring']['value']} opd_")


@pytest.fixture
def package(tmp_path):
    """Makes a package `opd_ops` of modules by their paths: `package({"x/one": "import y"})`."""

    def make(modules):
        root = tmp_path / "opd_ops"
        for name, text in {"__init__": "", **modules}.items():
            path = root / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        return Tree(root)

    return make


def test_imports_that_run_in_a_circle_are_counted_and_those_for_types_are_not(package):
    tree = package(
        {
            "a": "from opd_ops import b",
            "b": "def f():\n    from opd_ops.c import g",
            "c": "import opd_ops.a\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from opd_ops import d",
            "d": "from opd_ops.c import g",
        }
    )
    graph = structure.module_graph(tree)
    assert structure.circles(graph) == [{"opd_ops.a", "opd_ops.b", "opd_ops.c"}]
    assert structure.arrows_back_up(graph) == [("opd_ops.a", "opd_ops.b")]
    assert graph["opd_ops.d"] == {"opd_ops.c"}


def test_folders_that_import_each_other_by_different_files_are_a_circle(package):
    tree = package({"x/one": "from opd_ops.y.one import f", "x/two": "", "y/one": "", "y/two": "from ..x.two import f"})
    assert structure.circles(structure.module_graph(tree)) == []
    graphs = dict(structure.folder_graphs(tree))
    assert structure.circles(graphs["opd_ops"]) == [{"opd_ops.x", "opd_ops.y"}]
    assert len(structure.arrows_back_up(graphs["opd_ops"])) == 1


WALKED = {
    "__init__": "from opd_ops.loss import door",
    "loss": """
from opd_ops.prepare import prepare
from opd_ops import choose
def door(student: Tensor, teacher, *, fraction=0.1):
    call = prepare(student, teacher)
    chosen = choose.Chosen.of(call)
    return chosen.loss() + unrelated(fraction)
""",
    "prepare": """
from dataclasses import dataclass
from opd_ops.backends.interface import Backend, resolve
@dataclass
class Call:
    student: Tensor
    backend: Backend
    top_k: int
    def run(self) -> Tensor:
        return self.backend.token_stats(self)
def prepare(student: object, teacher: object) -> Call:
    return Call(student, resolve(student), 3)
""",
    "choose": """
from dataclasses import dataclass
from opd_ops.prepare import Call
@dataclass
class Chosen:
    call: Call
    @staticmethod
    def of(call: Call) -> "Chosen":
        scores = call.run()
        return Chosen(call)
    def loss(self) -> Tensor:
        return self.call.backend.selected_loss(*[self.call])
""",
    "backends/interface": """
class Backend:
    def token_stats(self, call) -> Tensor: ...
    def selected_loss(self, call) -> Tensor: ...
def resolve(student) -> Backend: ...
""",
}


def test_an_argument_is_followed_into_what_holds_it(package):
    tree = package(WALKED)
    walk = follow(tree, "opd_ops.loss", "door", "student", outside="opd_ops.backends")
    short = [name.removeprefix("opd_ops.") for name in walk.modules]
    assert short == ["loss", "prepare", "choose", "prepare", "choose"]  # back for `loss` after `of` had gone on
    assert walk.climbs == [("opd_ops.choose", "opd_ops.prepare")]
    assert [door.rpartition(".")[2] for door in walk.doors] == ["resolve", "token_stats", "selected_loss"]
    assert follow(tree, "opd_ops.loss", "door", "fraction", outside="opd_ops.backends").modules == ["opd_ops.loss"]


def test_parameters_of_public_doors_and_any_of_autograd_contexts_are_left_out(package):
    tree = package(
        {
            "__init__": 'from opd_ops.a import door\n__all__ = ["door"]',
            "a": """
from typing import Any
def door(a, b, c, d, *, e: dict[str, Any]): ...
class Function:
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any: ...
    def method(self, a, b, /, c, *rest: Any, **options: "Any"): ...
""",
        }
    )
    assert structure.parameter_counts(tree).where == ["3 opd_ops.a.Function.method", "2 opd_ops.a.Function.forward"]
    assert structure.any_in_signatures(tree).value == 3


def test_a_default_is_counted_where_it_is_written_again(package):
    tree = package(
        {
            "__init__": 'from opd_ops.a import Settings\n__all__ = ["Settings"]',
            "a": """
DEFAULT_BYTES = 2**20
class Settings:
    threshold: float | None = None
    fraction: float = _setting(0.05, "A share.")
    top_k: int = 16
    scope: str = "batch"
    bytes: int = DEFAULT_BYTES
""",
            "b": """
from opd_ops.a import DEFAULT_BYTES
class Config:
    fraction: float = field(default=0.05)
    scope: str = "batch"
    top_k: int = Settings.top_k
class List:
    top_k: int = 16
""",
        }
    )
    assert structure.default_places(tree).where == [
        "2 fraction: opd_ops.a.Settings, opd_ops.b.Config",
        "2 scope: opd_ops.a.Settings, opd_ops.b.Config",
        "1 bytes: opd_ops.a.DEFAULT_BYTES",
        "1 top_k: opd_ops.a.Settings",
    ]
