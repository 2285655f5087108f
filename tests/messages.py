"""The messages of all refusals, as they stand in the sources: literal text with ``{}`` for what is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / "python" / "schedulefree_cpp"
CPP = ROOT / "csrc"

# What takes a message in C++.
_CALLS = re.compile(
    r"\b(?:fail|TORCH_CHECK\w*|C10_THROW_ERROR|require|refuse_value|refuse\w*)\(|\bthrow std::\w+\("
)
_LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "{}"


def python_messages() -> Iterator[tuple[str, str]]:
    """Where, and the message of every ``raise`` with a text of its own."""
    for path in sorted(PYTHON.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", _text(node.exc.args[0])


def _argument_text(source: str, begin: int) -> str:
    """The text between the bracket before ``begin`` and its partner; literals may hold brackets."""
    depth, at = 1, begin
    while depth:
        literal = _LITERAL.match(source, at)
        if literal:
            at = literal.end()
            continue
        depth += {"(": 1, ")": -1}.get(source[at], 0)
        at += 1
    return source[begin : at - 1]


def cpp_messages() -> Iterator[tuple[str, str]]:
    """Where, and the literals of every call that refuses, with ``{}`` between those that do not follow."""
    for path in sorted([*CPP.rglob("*.h"), *CPP.rglob("*.cpp"), *CPP.rglob("*.cuh")]):
        source = re.sub(r"//[^\n]*", "", path.read_text())
        for call in _CALLS.finditer(source):
            text = _argument_text(source, call.end())
            message, end = "", None
            for literal in _LITERAL.finditer(text):
                between = "" if end is None else text[end : literal.start()].strip()
                message += ("{}" if between else "") + literal[1].replace('\\"', '"')
                end = literal.end()
            if message:
                line = source[: call.start()].count("\n") + 1
                yield f"{path.relative_to(ROOT)}:{line}", message


def fragments(message: str) -> list[str]:
    """The pieces of a message that can be looked for: those of some length."""
    message = re.sub(r"^schedulefree_cpp:(:\w+:)? ", "", message)
    pieces = [re.sub(r"\s+", " ", piece).strip(" :;,.") for piece in message.split("{}")]
    return [piece for piece in pieces if len(piece) >= 12]
