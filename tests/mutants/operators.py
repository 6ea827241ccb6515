"""Small faults, as a hurried edit makes them: every mutant of a module, one change each.

Why not mutmut or cosmic-ray: docs/mutants.md.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

SWAPPED_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
NEGATED = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
_PAIRS = (
    ("min", "max"), ("any", "all"), ("argmin", "argmax"), ("sum", "mean"), ("floor", "ceil"), ("ones", "zeros"),
    ("ones_like", "zeros_like"), ("maximum", "minimum"), ("cumsum", "cumprod"), ("new_ones", "new_zeros"),
)  # fmt: skip
SWAPPED_NAMES = dict(_PAIRS) | {b: a for a, b in _PAIRS}
# Calls that may be left out with the types unchanged: `x.detach()` and `F.relu(x)` become `x`.
DROPPED = {
    "abs", "clamp", "clone", "copy", "detach", "double", "exp", "float", "log", "masked_fill", "mul_", "normalize",
    "relu", "round", "sigmoid", "softmax", "softplus", "sorted", "reversed", "sqrt", "square", "tanh", "to", "resolve",
}  # fmt: skip
OPTIONAL = ("mask", "noise", "shared", "earlier", "stats", "counts", "labels", "position_ids", "state")
LAYER_NAMES = ("layer", "layer_index", "layer_idx", "index")


class Mutant(NamedTuple):
    """One change. `key` stays the same when other code changes."""

    key: str
    file: str
    function: str
    line: int
    operator: str
    before: str
    after: str
    tree: ast.Module


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(operator, what stands in the node's place) of each change of one node."""

    def edited(**fields: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.BinOp(left, op, right) if type(op) in SWAPPED_OPERATORS and not (
            _is_text(left) or _is_text(right)
        ):
            yield "arithmetic", edited(op=SWAPPED_OPERATORS[type(op)]())
        case ast.AugAssign(op=op):
            yield "statement", ast.Pass()
            if type(op) in SWAPPED_OPERATORS:
                yield "arithmetic", edited(op=SWAPPED_OPERATORS[type(op)]())
        case ast.Compare(ops=[op]):
            yield "negate", edited(ops=[NEGATED[type(op)]()])
            if type(op) in BOUNDARY:
                yield "boundary", edited(ops=[BOUNDARY[type(op)]()])
        case ast.BoolOp(op, values):
            yield "boolean", edited(op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield "operand", rest[0] if len(rest) == 1 else edited(values=rest)
        case ast.UnaryOp(op, operand) if isinstance(op, ast.Not | ast.Invert):
            yield "boolean", operand
        case ast.UnaryOp(ast.USub(), operand) if not isinstance(operand, ast.Constant):
            yield "sign", operand
        case ast.Constant(value=bool() as value):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float() as value):
            yield "constant", ast.Constant(value * 2 or 1.0)
        case ast.Call(func, args, keywords):
            name, base = _name(func), getattr(func, "value", None)
            if (
                name in DROPPED
                and isinstance(func, ast.Attribute)
                and _name(base) not in ("F", "torch", "functional")
            ):
                yield "call", base
            elif (name in DROPPED or name in ("min", "max")) and args:
                yield "call", args[0]
            if name in SWAPPED_NAMES:
                new = copy.copy(func)
                setattr(new, "attr" if isinstance(func, ast.Attribute) else "id", SWAPPED_NAMES[name])
                yield "name", edited(func=new)
            for i, argument in enumerate(args):
                if _name(argument).endswith(OPTIONAL):
                    yield "none", edited(args=[*args[:i], ast.Constant(None), *args[i + 1 :]])
            for i, keyword in enumerate(keywords):
                # A class's fields are mostly required; tensors of the tests are on the CPU; `strict` only asserts.
                if keyword.arg not in (None, "device", "strict") and not name[:1].isupper():
                    yield "keyword", edited(keywords=keywords[:i] + keywords[i + 1 :])
        case ast.Subscript(slice=ast.Name(id=name), ctx=ast.Load()) if name in LAYER_NAMES:
            yield "layer", edited(slice=ast.Constant(0))
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in LAYER_NAMES:
            yield "layer", ast.Constant(0)
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
            yield "statement", ast.Pass()
        case ast.If(test=test) | ast.IfExp(test=test) if (
            not isinstance(test, ast.Compare) and _name(test) != "TYPE_CHECKING"
        ):
            yield "branch", edited(test=ast.Constant(True))
            yield "branch", edited(test=ast.Constant(False))


def _places(
    node: ast.AST, path: tuple[str, ...]
) -> Iterator[tuple[ast.AST, str, int | None, tuple[str, ...]]]:
    """(parent, field, position in a list field, enclosing definitions) of every node that may change."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "msg") or isinstance(
            node, ast.Assert
        ):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST):
                continue
            inner = path
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = (*path, child.name)
            elif isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            elif isinstance(child, ast.Raise):  # the error's text is no business of a mutant's
                yield node, field, i, path
                continue
            yield node, field, i, path
            yield from _places(child, inner)


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """All mutants of a module, in the order of the source.

    While one is given out, `tree` is the mutated module: compile it before asking for the next.
    """
    seen: dict[str, int] = {}
    tree = ast.parse(source)
    for parent, field, position, path in list(_places(tree, ())):
        holder = getattr(parent, field)
        node = holder if position is None else holder[position]
        for operator, new in changes(node):
            before, after = (ast.unparse(n).split("\n")[0] for n in (node, new))
            identity = "|".join((file, ".".join(path), operator, before, after))
            seen[identity] = seen.get(identity, 0) + 1
            key = hashlib.sha256(f"{identity}|{seen[identity]}".encode()).hexdigest()[:10]
            replace = [new if n is node else n for n in holder] if position is not None else new
            setattr(parent, field, replace)
            ast.fix_missing_locations(ast.copy_location(new, node))
            yield Mutant(key, file, ".".join(path), getattr(node, "lineno", 0), operator, before, after, tree)
            setattr(parent, field, holder)
