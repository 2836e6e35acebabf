"""The demonstration tools of `rorqual chat`: harmless, so that tool calls can be seen."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from rorqual.records import ToolCall, ToolSpec
from rorqual.text.arguments import read_object

CALCULATOR = ToolSpec(
    name="calculator",
    description="Compute an arithmetic expression of numbers, + - * / // % ** and parentheses.",
    parameters={"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
)

TOOLS = {CALCULATOR.name: CALCULATOR}

MAX_EXPRESSION_LENGTH = 200
MAX_BITS = 2048

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def run_tool(call: ToolCall) -> str:
    """The result of a call; what is wrong with it is a result too. Never raises."""
    if call.name != CALCULATOR.name:
        return f"Error: there is no tool {call.name!r}."
    try:
        expression = read_object(call.arguments)["expression"]
        return str(compute(str(expression)))
    except (ValueError, KeyError, ArithmeticError) as error:
        return f"Error: {error if str(error) else type(error).__name__}"


def compute(expression: str) -> int | float:
    """The value of arithmetic on numbers; nothing is evaluated but the operators above.

    Raises: ValueError for anything else, or a number beyond `MAX_BITS` bits; ArithmeticError as Python does.
    """
    if len(expression) > MAX_EXPRESSION_LENGTH:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is not arithmetic") from None
    return _value(tree.body)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            size = left.bit_length() if isinstance(left, int) else 1
            if abs(right) > MAX_BITS or size * abs(right) > MAX_BITS:
                raise ValueError("the power is too large")
        return _bounded(_BINARY[type(node.op)](left, right))
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic on numbers")


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex) or (isinstance(value, int) and value.bit_length() > MAX_BITS):
        raise ValueError("the number is complex or too large")
    return value if isinstance(value, int) else float(value)
