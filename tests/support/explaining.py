"""What a condition waits for, and what is so instead: its own source, and the values in it."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_CHARACTERS = 2000
_SHOWN = (ast.Call, ast.Name, ast.Attribute, ast.Subscript)


def wanted(condition: Callable[[], Any]) -> str:
    """The condition as it is written."""
    if isinstance(condition, functools.partial):
        return f"{condition.func.__name__}{condition.args!r}"
    if not inspect.isfunction(condition):  # a method of a path, mostly
        return f"{getattr(condition, '__self__', '')!r}.{condition.__name__}()"
    node = _node(condition)
    if node is None:
        return condition.__name__
    return ast.unparse(node.body if isinstance(node, ast.Lambda) else node)


def seen(condition: Callable[[], Any]) -> dict[str, str]:
    """What the parts of a lambda are now, by their source; of any other condition, what it returns."""
    node = _node(condition) if inspect.isfunction(condition) else None
    if not isinstance(node, ast.Lambda):
        return {"the condition": _shown(condition)}
    inner = inspect.getclosurevars(condition).nonlocals
    defaults = {name: parameter.default for name, parameter in inspect.signature(condition).parameters.items()}
    names = {**condition.__globals__, **inner, **defaults}
    called = {id(one.func) for one in ast.walk(node.body) if isinstance(one, ast.Call)}
    parts = [one for one in ast.walk(node.body) if isinstance(one, _SHOWN) and id(one) not in called and _is_read(one)]
    values = dict[str, str]()
    for part in parts:
        if (value := _value(part, names)) is not None:
            values[ast.unparse(part)] = value
    return values


def _is_read(part: ast.expr) -> bool:
    return isinstance(getattr(part, "ctx", ast.Load()), ast.Load)


def _value(part: ast.expr, names: dict[str, Any]) -> str | None:
    """What a part of a condition is now; None if it is nothing to be shown, or differs while the condition is asked."""
    code = compile(ast.fix_missing_locations(ast.Expression(part)), "condition", "eval")
    try:
        value = eval(code, dict(names))
    except NameError:  # the variable of a comprehension
        return None
    except Exception as error:  # noqa: BLE001  what is not there yet, for example
        return f"{type(error).__name__}: {error}"
    shown = repr(value)
    return None if shown.startswith("<") else shown[:_MOST_CHARACTERS]


def _shown(condition: Callable[[], Any]) -> str:
    try:
        return repr(condition())[:_MOST_CHARACTERS]
    except Exception as error:  # noqa: BLE001  what is not there yet, for example
        return f"{type(error).__name__}: {error}"


def _node(condition: Any) -> ast.Lambda | ast.FunctionDef | None:
    """The syntax of a function."""
    code = condition.__code__
    tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda | ast.FunctionDef)]
    of_line = [node for node in nodes if node.lineno == code.co_firstlineno and _name(node) == code.co_name]
    if len(of_line) > 1:  # several lambdas in a line: the one in which the first instruction is
        first = next(((line, column) for line, _, column, _ in code.co_positions() if column), None)
        of_line = [node for node in of_line if isinstance(node, ast.Lambda) and _has_begun(node.body, first)]
    return of_line[0] if of_line else None


def _name(node: ast.Lambda | ast.FunctionDef) -> str:
    return "<lambda>" if isinstance(node, ast.Lambda) else node.name


def _has_begun(node: ast.expr, place: tuple[int | None, int] | None) -> bool:
    if place is None:  # in Python 3.12, that of a constant
        return isinstance(node, ast.Constant)
    return (node.lineno, node.col_offset) <= place < (node.end_lineno, node.end_col_offset)
