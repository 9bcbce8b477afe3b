"""Faults planted in the source of the kernels, one at a time: every comparison, mask, index, constant and sum."""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

SWAPS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A changed source: the function that is changed, its statement as it was, and what became of a part of it."""

    function: str
    statement: str
    change: str
    source: str
    repeat: int = 1

    @property
    def name(self) -> str:
        """Function, statement and change in a line, with a number where the function has the same several times."""
        number = f" ({self.repeat})" if self.repeat > 1 else ""
        return f"{self.function}: {self.statement} | {self.change}{number}"


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a file of kernels, in the order of the file."""
    tree, seen = ast.parse(source), Counter[str]()
    for place, function in enumerate(tree.body):
        if not isinstance(function, ast.FunctionDef):
            continue
        for number, node in enumerate(_body_nodes(function)):
            statement, before = ast.unparse(_statement_of(function, node)), ast.unparse(node)
            for kind in range(len(list(_changes(node)))):
                altered = copy.deepcopy(tree)
                target = altered.body[place]
                twin = _body_nodes(target)[number]
                replacement = list(_changes(twin))[kind]
                _Replace(twin, replacement).visit(target)
                ast.fix_missing_locations(altered)
                change = f"{before.splitlines()[0]} -> {ast.unparse(replacement).splitlines()[0]}"
                mutant = Mutant(function.name, statement.splitlines()[0], change, ast.unparse(altered))
                seen[mutant.name] += 1
                yield replace(mutant, repeat=seen[mutant.name])


def _body_nodes(function: ast.stmt) -> list[ast.AST]:
    """Nodes of a function's body, without annotations and its docstring."""
    assert isinstance(function, ast.FunctionDef)
    skipped = {id(part) for node in ast.walk(function) for part in _annotation(node)}
    return [node for statement in function.body[1:] for node in ast.walk(statement) if id(node) not in skipped]


def _annotation(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.AnnAssign):
        yield from ast.walk(node.annotation)


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may become of a node."""
    match node:
        case ast.Compare(ops=[ast.Lt()]):
            yield ast.Compare(node.left, [ast.LtE()], node.comparators)
            yield ast.Compare(_plus(node.left, 1), [ast.Lt()], node.comparators)
        case ast.Compare(ops=[ast.Gt()]):
            yield ast.Compare(node.left, [ast.LtE()], node.comparators)
        case ast.Compare(ops=[ast.IsNot()]):
            yield ast.Compare(node.left, [ast.Is()], node.comparators)
        case ast.BinOp(op=ast.BitAnd()):
            yield node.left
            yield node.right
        case ast.BinOp(op=op) if type(op) in SWAPS:
            yield ast.BinOp(node.left, SWAPS[type(op)](), node.right)
            if isinstance(op, ast.Add):
                yield node.left
                yield node.right
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value + 1.0)
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, kept, _]):
            yield kept
        case ast.Call(func=ast.Attribute(attr="to", value=value), args=[_]):
            yield value
        case ast.Call(func=ast.Attribute(attr="load" | "store")) if any(word.arg == "mask" for word in node.keywords):
            yield ast.Call(node.func, node.args, [])
        case ast.Call(func=ast.Attribute(attr="dot"), args=[left, right, _]):
            yield ast.Call(node.func, [left, right], [])
        case ast.Call(func=ast.Name(id="gelu"), args=[value]):
            yield value
        case ast.If(test=ast.Name()):
            yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.AugAssign():
            yield ast.Assign([node.target], node.value)
            yield ast.Pass()
        case _:
            return


def _plus(node: ast.expr, value: int) -> ast.expr:
    return ast.BinOp(node, ast.Add(), ast.Constant(value))


def _statement_of(function: ast.FunctionDef, node: ast.AST) -> ast.AST:
    """The innermost statement that holds a node."""
    found: ast.AST = function
    for statement in ast.walk(function):
        if isinstance(statement, ast.stmt) and any(part is node for part in ast.walk(statement)):
            found = statement
    return found


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, replacement: ast.AST) -> None:
        self.target, self.replacement = target, replacement

    def visit(self, node: ast.AST) -> ast.AST:
        return self.replacement if node is self.target else self.generic_visit(node)
