"""The structure of the source, in figures that must not get worse: `python -m tests.support.structure`.

  --json     the same for programs        --limits     exit 1 where a figure is worse than in LIMITS

  circles            groups of modules that import each other, and groups of a folder's files and folders that do so by
                     the modules inside them; an import inside a function counts, one under TYPE_CHECKING does not
  arrows back up     fewest imports that would have to go so that there is no circle
  rooms              files and folders at the top of opd_ops
  stays, climbs      of `student` on its way from selective_opd_loss to the backends (follow.py)
  parameters         most of a function that is no public door: neither in opd_ops.__all__ nor a method of a class there
  places             most places that write the default of one setting, a field of Settings: functions and classes
                     that have `fraction` or at least three of the settings, and constants DEFAULT_...
  docstring          words of the longest one
  README             lines, words
  Any                annotations with `Any` in signatures of opd_ops, but for functions whose first parameter is `ctx`

A change that improves a figure lowers its limit in the same commit; a limit is never raised.
Not here: reading the source (source_tree.py), following an argument (follow.py).
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import networkx

from tests.support.follow import Walk, follow
from tests.support.source_tree import Function, Tree, parameters

ROOT = Path(__file__).parents[2]
PACKAGE, DOOR, SETTINGS = "opd_ops", "selective_opd_loss", "Settings"
LIMITS = {
    "circles between modules": 0,
    "circles between folders": 0,
    "arrows back up between modules": 0,
    "arrows back up between folders": 0,
    "rooms": 15,
    "stays of student": 12,
    "climbs of student": 1,
    "parameters of a function": 10,
    "places of a default": 1,
    "words of a docstring": 346,
    "README lines": 136,
    "README words": 692,
    "Any in signatures": 0,
}
Graph = Mapping[str, set[str]]


class Measure(NamedTuple):
    value: int
    where: list[str]  # what the value is made of, worst first


# --- imports ---------------------------------------------------------------------------------------------------------


def module_graph(tree: Tree) -> dict[str, set[str]]:
    return {name: tree.imports(name) for name in tree.modules}


def folder_graphs(tree: Tree) -> Iterator[tuple[str, dict[str, set[str]]]]:
    """Of each folder: its files and folders, and which import each other by what is inside them."""
    modules = module_graph(tree)
    for folder in sorted(name for name, module in tree.modules.items() if module.is_package):
        inside = {name: _child(folder, name) for name in modules if name.startswith(f"{folder}.")}
        graph: dict[str, set[str]] = {child: set() for child in inside.values()}
        for name, child in inside.items():
            graph[child] |= {inside[x] for x in modules[name] if x in inside} - {child}
        yield folder, graph


def _child(folder: str, name: str) -> str:
    return f"{folder}.{name.removeprefix(folder + '.').split('.')[0]}"


def circles(graph: Graph) -> list[set[str]]:
    """The groups of at least two nodes that all reach each other."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(graph))
    return sorted((group for group in groups if len(group) > 1), key=sorted)


def arrows_back_up(graph: Graph) -> list[tuple[str, str]]:
    """The fewest arrows without which no circle is left; of equal choices the first in the order of names."""
    removed: list[tuple[str, str]] = []
    for group in circles(graph):
        inside = {node: {x for x in graph[node] if x in group} for node in group}
        arrows = sorted((node, x) for node in inside for x in inside[node])
        for n in range(1, len(arrows) + 1):
            choice = next((c for c in combinations(arrows, n) if not circles(_without(inside, c))), None)
            if choice is not None:
                removed += choice
                break
    return removed


def _without(graph: Graph, arrows: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    gone = set(arrows)
    return {node: {x for x in graph[node] if (node, x) not in gone} for node in graph}


# --- functions -------------------------------------------------------------------------------------------------------


def public_names(tree: Tree) -> set[str]:
    """What opd_ops.__all__ lists."""
    for node in tree.modules[PACKAGE].tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{PACKAGE} has no __all__")


def functions(tree: Tree) -> Iterator[tuple[str, str, Function]]:
    """Those of opd_ops: module, qualified name, node."""
    for name, module in tree.modules.items():
        if name.split(".")[0] == PACKAGE:
            for qualified, node in module.functions():
                yield name, qualified, node


def parameter_counts(tree: Tree) -> Measure:
    public = public_names(tree)
    counts = [
        (len(parameters(node)), f"{module}.{qualified}")
        for module, qualified, node in functions(tree)
        if qualified.split(".")[0] not in public
    ]
    return _worst(counts)


def any_in_signatures(tree: Tree) -> Measure:
    numbers: dict[str, int] = {}
    for module, qualified, node in functions(tree):
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(x for x in (given.vararg, given.kwarg) if x)]
        if arguments and arguments[0].arg == "ctx":
            continue
        annotations = [x.annotation for x in arguments if x.annotation] + ([node.returns] if node.returns else [])
        n = sum(any(_is_any(x) for x in ast.walk(annotation)) for annotation in annotations)
        if n:
            numbers[f"{module}.{qualified}"] = n
    counts = _worst([(n, name) for name, n in numbers.items()])
    return Measure(sum(numbers.values()), counts.where)


def _is_any(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Constant) and node.value == "Any")


def settings(tree: Tree) -> set[str]:
    """Fields of `Settings` that have a default other than None."""
    definition = tree.definition(PACKAGE, SETTINGS)
    assert definition is not None
    assert not isinstance(definition, str)
    return {name for name, default in _defaults(definition.node) if not _is_none(default)}


def default_places(tree: Tree) -> Measure:
    known = settings(tree)
    written: dict[str, list[str]] = {name: [] for name in known}
    for name, module in tree.modules.items():
        if name.split(".")[0] != PACKAGE:
            continue
        for constant, value in module.aliases.items():
            setting = constant.lower().removeprefix("default_")
            if constant.startswith("DEFAULT_") and setting in known and _is_written(value):
                written[setting].append(f"{name}.{constant}")
        for holder in ast.walk(module.tree):
            if not isinstance(holder, (ast.ClassDef, *Function.__args__)):
                continue
            taken = {x for x, _ in _fields(holder)} & known
            if len(taken) < 3 and "fraction" not in taken:
                continue
            for setting, default in _defaults(holder):
                if setting in known and _is_written(default):
                    written[setting].append(f"{name}.{holder.name}")
    counts = sorted(((len(places), setting) for setting, places in written.items()), key=lambda x: (-x[0], x[1]))
    return Measure(counts[0][0], [f"{n} {setting}: {', '.join(written[setting])}" for n, setting in counts[:5] if n])


def _fields(holder: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Parameters of a function, or annotated fields of a class, with their defaults."""
    if isinstance(holder, ast.ClassDef):
        for node in holder.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id, _field_default(node.value)
        return
    assert isinstance(holder, Function.__args__)
    given = holder.args
    by_position = [*given.posonlyargs, *given.args]
    yield from ((x.arg, None) for x in by_position[: len(by_position) - len(given.defaults)])
    yield from zip((x.arg for x in by_position[len(by_position) - len(given.defaults) :]), given.defaults, strict=True)
    yield from zip((x.arg for x in given.kwonlyargs), given.kw_defaults, strict=True)


def _field_default(value: ast.expr | None) -> ast.expr | None:
    """Of `field(default=x)` or `_setting(x, help)`, x."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field":
        return next((x.value for x in value.keywords if x.arg == "default"), None)
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "_setting":
        return value.args[0]
    return value


def _defaults(holder: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    yield from ((name, default) for name, default in _fields(holder) if default is not None)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_written(node: ast.expr) -> bool:
    """A literal, or arithmetic of literals; not the name of what is written elsewhere."""
    return not _is_none(node) and not any(isinstance(x, (ast.Name, ast.Call)) for x in ast.walk(node))


# --- words -----------------------------------------------------------------------------------------------------------


def docstrings(tree: Tree) -> Measure:
    counts = [
        (len(text.split()), name if isinstance(node, ast.Module) else f"{name}.{node.name}")
        for name, module in tree.modules.items()
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Module, ast.ClassDef, *Function.__args__)) and (text := ast.get_docstring(node))
    ]
    return _worst(counts)


def _worst(counts: list[tuple[int, str]]) -> Measure:
    ordered = sorted(counts, key=lambda x: (-x[0], x[1]))
    return Measure(ordered[0][0] if ordered else 0, [f"{n} {name}" for n, name in ordered[:5]])


# --- the table -------------------------------------------------------------------------------------------------------


@cache
def measures(root: Path = ROOT) -> dict[str, Measure]:
    tree = Tree(root / PACKAGE, root / "kernels" / "opd_kernels")
    modules = module_graph(tree)
    folders = dict(folder_graphs(tree))
    is_folder = {name for name, module in tree.modules.items() if module.is_package}
    module_circles = circles(modules)
    folder_circles = [group for graph in folders.values() for group in circles(graph) if group & is_folder]
    up, up_folders = (
        arrows_back_up(modules),
        [arrow for graph in folders.values() for arrow in arrows_back_up(graph) if is_folder & set(arrow)],
    )
    rooms = sorted(path.name for path in (root / PACKAGE).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())
    readme = (root / "README.md").read_text()
    walk = student_walk(tree)
    return {
        "circles between modules": Measure(len(module_circles), [", ".join(sorted(group)) for group in module_circles]),
        "circles between folders": Measure(len(folder_circles), [", ".join(sorted(group)) for group in folder_circles]),
        "arrows back up between modules": Measure(len(up), [" -> ".join(arrow) for arrow in up]),
        "arrows back up between folders": Measure(len(up_folders), [" -> ".join(arrow) for arrow in up_folders]),
        "rooms": Measure(len(rooms), [", ".join(rooms)]),
        "stays of student": Measure(len(walk.modules), [" > ".join(x.split(".")[-1] for x in walk.modules)]),
        "climbs of student": Measure(len(walk.climbs), [" -> ".join(arrow) for arrow in walk.climbs]),
        "parameters of a function": parameter_counts(tree),
        "places of a default": default_places(tree),
        "words of a docstring": docstrings(tree),
        "README lines": Measure(len(readme.splitlines()), []),
        "README words": Measure(len(readme.split()), []),
        "Any in signatures": any_in_signatures(tree),
    }


def student_walk(tree: Tree) -> Walk:
    walk = follow(tree, PACKAGE, DOOR, "student", outside=f"{PACKAGE}.backends")
    assert any(door.endswith("loss") for door in walk.doors), f"student was lost on its way to a backend: {walk.calls}"
    return walk


def worse(values: Mapping[str, int], limits: Mapping[str, int] = LIMITS) -> list[str]:
    """What is above its limit, in words."""
    return [f"{name}: {value}, at most {limits[name]} allowed" for name, value in values.items() if value > limits[name]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.structure", description="The structure of the source, in figures."
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--limits", action="store_true", help="exit 1 where a figure is worse than its limit")
    given = parser.parse_args(arguments)
    table = measures()
    if given.json:
        print(json.dumps({name: measure._asdict() for name, measure in table.items()}, indent=1))
    else:
        for name, measure in table.items():
            print(f"{name:<32}{measure.value:>6}  (limit {LIMITS[name]})")
            for line in measure.where:
                print(f"        {line}")
    too_much = worse({name: measure.value for name, measure in table.items()}) if given.limits else []
    for line in too_much:
        print(line, file=sys.stderr)
    return int(bool(too_much))


if __name__ == "__main__":
    sys.exit(main())
