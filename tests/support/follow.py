"""Follows one argument through the calls of a package, without running it: from a function, into every function that receives
the argument, to the door of the backends.

  stay     a module is entered by a call that hands the argument on, or something made of it; the calls of one function into
           one module are one stay while it calls no other
  return   a stay in a module that was entered before
  climb    a return to a module that was entered earlier than the one that calls

What holds the argument: the name itself, its attributes that are objects, tuples and lists of it, what `replace` makes of it,
and what a function of the package returns as an object (by its return annotation) when it was handed the argument. Tensors
that functions return, statistics and results do not hold it. Methods are found by the annotations of fields, parameters and
return values. A call of a module under `backends` is not entered. Branches are all taken, once each, in the order of the
source.
Not here: the figures' limits (structure.py).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.support.source_tree import Definition, Function, Tree, is_property

RESULTS = ("TokenStats", "OwnStats", "SelectionOptions", "SelectiveOPDOutput", "TokenLosses")  # numbers and flags
COPIES = ("replace", "dataclasses.replace", "_replace", "detach")
CONTAINERS = ("list", "tuple", "iter", "next", "zip", "reversed", "enumerate")


class Value(NamedTuple):
    """What is known of an expression: whether it holds the argument, and which classes of the package it may be of."""

    holds: bool = False
    classes: frozenset[tuple[str, str]] = frozenset()  # (module, name)


def joined(*values: Value) -> Value:
    return Value(any(x.holds for x in values), frozenset().union(*(x.classes for x in values)))


@dataclass
class Walk:
    tree: Tree
    outside: str  # modules that are not entered: those below it
    modules: list[str] = field(default_factory=list)  # one a stay
    doors: list[str] = field(default_factory=list)  # functions outside that the argument is handed to
    climbs: list[tuple[str, str]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # every function entered
    carriers: set[tuple[str, str]] = field(default_factory=set)  # classes whose objects hold the argument
    _stack: list[tuple[str, str]] = field(default_factory=list)
    _entry: tuple[tuple[str, str] | None, str] | None = None  # the last stay: by which function, in which module
    _walked: set[tuple[str, str]] = field(default_factory=set)

    @property
    def rooms(self) -> list[str]:
        return list(dict.fromkeys(self.modules))

    @property
    def returns(self) -> int:
        return len(self.modules) - len(self.rooms)

    def enter(self, function: Definition, given: dict[str, Value]) -> Value:
        """Walk a function's body with these arguments; what it returns."""
        node = function.node
        assert isinstance(node, Function.__args__)
        returned = self._annotated(function.module, node.returns)
        key = function.module, f"{node.name}:{node.lineno}"
        caller = self._stack[-1][0] if self._stack else None
        entry = (self._stack[-1] if self._stack else None), function.module
        if caller != function.module and entry != self._entry:
            self._entry = entry
            rooms = self.rooms
            if function.module in rooms and rooms.index(function.module) < rooms.index(caller or function.module):
                self.climbs.append((caller or "", function.module))
            self.modules.append(function.module)
        self.calls.append(f"{function.module}.{node.name}")
        self.carriers |= returned.classes
        result = Value(bool(returned.classes), returned.classes)
        if key in self._walked:
            return result
        self._walked.add(key)
        self._stack.append(key)
        known = {x.arg: self._annotated(function.module, x.annotation) for x in ast.walk(node.args) if isinstance(x, ast.arg)}
        names = {
            name: Value(given.get(name, Value()).holds, known[name].classes | given.get(name, Value()).classes)
            for name in known
        }
        _Body(self, function.module, names).run(node.body)
        self._stack.pop()
        return result

    def _annotated(self, module: str, annotation: ast.expr | None) -> Value:
        """The classes of the package that an annotation names."""
        if annotation is None:
            return Value()
        classes: set[tuple[str, str]] = set()
        for name in re.findall(r"[A-Za-z_][\w.]*", ast.unparse(annotation)):
            x = self.tree.definition(module, name)
            if isinstance(x, Definition) and isinstance(x.node, ast.ClassDef):
                classes.add((x.module, x.name))
            elif x is None and (alias := self.tree.alias(module, name)) is not None:
                classes |= self._annotated(*alias).classes
        return Value(False, frozenset(x for x in classes if x[1] not in RESULTS))

    def attribute(self, of: Value, name: str) -> Value:
        """An attribute of an object: what its field or property is annotated as; an unknown object's are unknown."""
        declared_as = Value()
        for module, kind in of.classes:
            definition = self.tree.definition(module, kind)
            assert isinstance(definition, Definition)
            declared = _declared(definition.node, name)
            declared_as = joined(declared_as, self._annotated(module, declared))
        return Value(of.holds and bool(declared_as.classes & self.carriers), declared_as.classes)

    def called(
        self, function: Definition | str | None, given: list[Value], named: dict[str, Value], self_: Value | None
    ) -> Value:
        """A call of a function or class of the package."""
        holds = any(x.holds for x in (*given, *named.values(), self_ or Value()))
        if not isinstance(function, Definition):
            return Value()
        if isinstance(function.node, ast.ClassDef):
            made = frozenset() if function.name in RESULTS else frozenset({(function.module, function.name)})
            self.carriers |= made if holds else set()
            return Value(holds and bool(made), made)
        returned = self._annotated(function.module, function.node.returns)
        if not holds:
            return returned
        if function.module == self.outside or function.module.startswith(self.outside + "."):
            self.doors.append(f"{function.module}.{function.name}")
            return returned  # a backend's results are numbers
        taken = [x.arg for x in (*function.node.args.posonlyargs, *function.node.args.args)]
        arguments = dict(named)
        if taken and taken[0] in ("self", "cls"):
            arguments[taken.pop(0)] = self_ or Value()
        arguments |= zip(taken, given, strict=False)
        return self.enter(function, arguments)


class _Body:
    """The statements of one function, in order, with what its names hold."""

    def __init__(self, walk: Walk, module: str, names: dict[str, Value]) -> None:
        self.walk, self.module, self.names = walk, module, names

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, Function.__args__):  # its body runs where it is called; what it names is in reach here
            self.run(node.body)
        elif isinstance(node, ast.Assign):
            self._assign(node.targets[0], node.value)
            for target in node.targets[1:]:
                self._bind(target, self.names.get(ast.unparse(node.targets[0]), Value()))
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self._bind(node.target, self.value(node.iter))
            self.run([*node.body, *node.orelse])
        else:
            for _, part in ast.iter_fields(node):
                for child in part if isinstance(part, list) else [part]:
                    if isinstance(child, ast.stmt):
                        self._statement(child)
                    elif isinstance(child, ast.expr):
                        self.value(child)
                    elif isinstance(child, ast.withitem):
                        value = self.value(child.context_expr)
                        if child.optional_vars is not None:
                            self._bind(child.optional_vars, value)
                    elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                        self.run(child.body)

    def _assign(self, target: ast.expr, source: ast.expr) -> None:
        pairs = [x.elts for x in (target, source) if isinstance(x, (ast.Tuple, ast.List))]
        if len(pairs) == 2 and len(pairs[0]) == len(pairs[1]):
            values = [self.value(part) for part in pairs[1]]  # all before any name changes
            for part, value in zip(pairs[0], values, strict=True):
                self._bind(part, value)
        else:
            self._bind(target, self.value(source))

    def _bind(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Starred):
            self._bind(target.value, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self._bind(part, value)

    def value(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, Value())
        if isinstance(node, ast.Attribute):
            return self.walk.attribute(self.value(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            for part in node.generators:
                self._bind(part.target, self.value(part.iter))
                for condition in part.ifs:
                    self.value(condition)
            return joined(
                *(self.value(x) for x in (node.key, node.value)) if isinstance(node, ast.DictComp) else [self.value(node.elt)]
            )
        if isinstance(node, ast.Lambda):
            self.value(node.body)
            return Value()
        children = [self.value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if isinstance(node, (ast.Compare, ast.BinOp, ast.UnaryOp, ast.JoinedStr, ast.FormattedValue)):
            return Value()  # a number, a text
        if isinstance(node, ast.IfExp):
            return joined(*children[1:])
        if isinstance(node, ast.NamedExpr):
            self._bind(node.target, children[1])
        return joined(*children) if children else Value()

    def _call(self, node: ast.Call) -> Value:
        given = [self.value(x) for x in node.args]
        named = {x.arg or "**": self.value(x.value) for x in node.keywords}
        text = ast.unparse(node.func)
        if text.split(".")[-1] in COPIES:
            return joined(*given, *([self.value(node.func.value)] if isinstance(node.func, ast.Attribute) else []))
        if text in CONTAINERS:
            return joined(*given)
        given = self._spread(node.args, given)
        if text == "partial" or text == "functools.partial":
            return Value()
        if re.fullmatch(r"[\w.]+", text) and text.split(".")[0] not in self.names:
            return self.walk.called(self.walk.tree.definition(self.module, text), given, named, None)
        if not isinstance(node.func, ast.Attribute):
            self.value(node.func)
            return Value()
        owner = self.value(node.func.value)
        results = [
            self.walk.called(method, given, named, owner)
            for module, kind in sorted(owner.classes)
            if isinstance(definition := self.walk.tree.definition(module, kind), Definition)
            and (method := self.walk.tree.method(definition, node.func.attr)) is not None
        ]
        return joined(*results) if results else Value()

    def _spread(self, nodes: list[ast.expr], values: list[Value]) -> list[Value]:
        """Of `*pair`: what it holds, at two places, because a call takes two sides."""
        return [
            x
            for node, value in zip(nodes, values, strict=True)
            for x in ([value] * 2 if isinstance(node, ast.Starred) else [value])
        ]


def _declared(node: ast.AST, name: str) -> ast.expr | None:
    """The annotation of a field or property of a class."""
    for child in getattr(node, "body", []):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name) and child.target.id == name:
            return child.annotation
        if isinstance(child, Function.__args__) and child.name == name and is_property(child):
            return child.returns
    return None


def follow(tree: Tree, module: str, function: str, parameter: str, *, outside: str) -> Walk:
    """The walk of one parameter of a function."""
    start = tree.definition(module, function)
    assert isinstance(start, Definition), f"{module}.{function} is not defined"
    walk = Walk(tree, outside)
    annotation = next(x.annotation for x in ast.walk(start.node) if isinstance(x, ast.arg) and x.arg == parameter)
    walk.carriers |= walk._annotated(module, annotation).classes
    walk.enter(start, {parameter: Value(True)})
    return walk
