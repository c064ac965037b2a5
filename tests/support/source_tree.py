"""The source of a package as ast: its modules, what each imports, and what a name in one of them stands for.

Nothing is imported or run. Imports under `if TYPE_CHECKING` are left out of `imports`, because they never run; those inside
functions are in.
Not here: what is counted (structure.py), how an argument is followed (follow.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A class or a function, and the module that defines it."""

    module: str
    node: ast.ClassDef | Function

    @property
    def name(self) -> str:
        return self.node.name


@dataclass
class Module:
    name: str
    tree: ast.Module
    is_package: bool
    names: dict[str, str] = field(default_factory=dict)  # what is imported: local name -> dotted name

    @cached_property
    def definitions(self) -> dict[str, ast.ClassDef | Function]:
        return {node.name: node for node in self.tree.body if isinstance(node, (ast.ClassDef, *Function.__args__))}

    @cached_property
    def aliases(self) -> dict[str, ast.expr]:
        """Names that stand for an expression, like `Side = Tensor | LinearHead`."""
        return {
            x.targets[0].id: x.value for x in self.tree.body if isinstance(x, ast.Assign) and isinstance(x.targets[0], ast.Name)
        }

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Every function with its qualified name, methods and nested ones too."""
        yield from _functions(self.tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{child.name}" if isinstance(child, (ast.ClassDef, *Function.__args__)) else prefix.rstrip(".")
        if isinstance(child, Function.__args__):
            yield name, child
        yield from _functions(child, f"{name}." if name else "")


class Tree:
    """All modules of the given packages, by dotted name."""

    def __init__(self, *roots: Path) -> None:
        self.modules: dict[str, Module] = {}
        for root in roots:
            for path in sorted(root.rglob("*.py")):
                parts = [root.name, *path.relative_to(root).with_suffix("").parts]
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                self.modules[name] = Module(name, ast.parse(path.read_text()), is_package)
        for module in self.modules.values():
            module.names = dict(self._imported(module, module.tree))

    def _imported(self, module: Module, tree: ast.AST) -> Iterator[tuple[str, str]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.asname or alias.name.split(".")[0], alias.name if alias.asname else alias.name.split(".")[0]
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield alias.asname or alias.name, f"{self._origin(module, node)}.{alias.name}"

    def _origin(self, module: Module, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def imports(self, name: str) -> set[str]:
        """The modules of the tree that a module imports: a submodule where the name is one, else the module named."""
        module = self.modules[name]
        targets: set[str] = set()
        for node in _that_run(module.tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                dotted = {f"{origin}.{alias.name}" for alias in node.names}
                targets |= {x if x in self.modules else origin for x in dotted}
        return {x for x in targets if x in self.modules and x != name}

    def definition(self, module: str, dotted: str) -> Definition | str | None:
        """What a dotted name in a module stands for: a class or function of the tree, the name of a module, or None."""
        first, *attributes = dotted.split(".")
        here = self.modules[module]
        if first in here.definitions:
            return self._within(Definition(module, here.definitions[first]), attributes)
        return self._absolute(".".join([here.names[first], *attributes])) if first in here.names else None

    def _absolute(self, dotted: str) -> Definition | str | None:
        if dotted in self.modules:
            return dotted
        parts = dotted.split(".")
        for end in range(len(parts) - 1, 0, -1):
            origin = ".".join(parts[:end])
            if origin in self.modules:
                return self.definition(origin, ".".join(parts[end:]))  # one that a package hands on is followed
        return None

    def _within(self, inner: Definition, attributes: list[str]) -> Definition | None:
        for name in attributes:
            if not isinstance(inner.node, ast.ClassDef):
                return None
            method = self.method(inner, name)
            if method is None:
                return None
            inner = method
        return inner

    def alias(self, module: str, name: str) -> tuple[str, ast.expr] | None:
        """The module and the expression of an alias, here or where it is imported from."""
        here = self.modules[module]
        if name in here.aliases:
            return module, here.aliases[name]
        origin, _, own = here.names.get(name, "").rpartition(".")
        return self.alias(origin, own) if origin in self.modules else None

    def method(self, of: Definition, name: str) -> Definition | None:
        """A method of a class or of its bases in the tree."""
        assert isinstance(of.node, ast.ClassDef)
        for node in of.node.body:
            if isinstance(node, Function.__args__) and node.name == name:
                return Definition(of.module, node)
        for base in of.node.bases:
            parent = self.definition(of.module, ast.unparse(base))
            if (
                isinstance(parent, Definition)
                and isinstance(parent.node, ast.ClassDef)
                and (inherited := self.method(parent, name))
            ):
                return inherited
        return None


def _that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for node in child.orelse:
                yield from _that_run(node)
            continue
        yield child
        yield from _that_run(child)


def is_property(function: Function) -> bool:
    return any(ast.unparse(x).split(".")[-1] in ("property", "cached_property") for x in function.decorator_list)


def parameters(function: Function) -> list[ast.arg]:
    """All that a function takes by name, `self` and `cls` not counted."""
    given = function.args
    names = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [x for x in names if x.arg not in ("self", "cls")]
