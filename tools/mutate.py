"""Seeded mutations of what each test file is about: ``python -m tools.mutate [--seed 0] [--count 5] [NAME ...]``.

In a copy of the checkout one place of a source is changed (an operator, a sign, a condition, a constant, a statement
left out), and its tests run until one fails. What survives is printed; docs/testing.md says what came of it.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .mutations import SUBJECTS, Subject

ROOT = Path(__file__).resolve().parent.parent
Edit = tuple[int, int, bytes]  # what replaces source[start:end]

PAIRS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)]
PAIRS += [(ast.Add, ast.Sub), (ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift), (ast.And, ast.Or)]
OTHER = {**dict(PAIRS), **{b: a for a, b in PAIRS}, ast.Mult: ast.Add, ast.Pow: ast.Mult}
OTHER |= dict.fromkeys((ast.Div, ast.FloorDiv, ast.Mod), ast.Mult)
SYMBOLS = "+ - * / % < <= > >= == != && || += << >> & ?", "- + + * * <= < >= > != == || && -= >> << | ?!"
UNBUILT = "is not built"


def changed(node: ast.AST) -> ast.AST | None:
    """The expression with another operator, sign, condition or constant."""
    if isinstance(node, ast.Compare):
        node.ops[0] = OTHER[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OTHER:
        node.op = OTHER[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        return node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    else:
        return None
    return node


def edits_of_python(source: bytes, within: str) -> Iterator[Edit]:
    """In functions and classes whose names match; never in annotations, messages, docstrings and imports."""
    starts = [0, *(found.end() for found in re.finditer(rb"\n", source))]

    def edit(node: ast.AST, text: str) -> Edit:
        begin = starts[node.lineno - 1] + node.col_offset
        return begin, starts[node.end_lineno - 1] + node.end_col_offset, text.encode()

    def visit(node: ast.AST, inside: bool) -> Iterator[Edit]:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise, ast.Assert, ast.JoinedStr)):
            return
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inside = inside or re.fullmatch(within, node.name) is not None
            children = node.body
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        if inside:
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)) and not isinstance(node.value, ast.Constant):
                yield edit(node, "pass")
            if isinstance(node, (ast.If, ast.IfExp, ast.While)):
                yield edit(node.test, f"(not ({ast.unparse(node.test)}))")
            if isinstance(node, ast.expr) and (other := changed(copy.deepcopy(node))):
                yield edit(node, f"({ast.unparse(other)})")
        for child in children:
            yield from visit(child, inside)

    yield from visit(ast.parse(source), within == ".*")


def edits_of_cpp(source: bytes, within: str) -> Iterator[Edit]:
    """In blocks of code, each from a line that matches to the brace that ends it."""
    code = re.sub(rb"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"|(?m:^#.*$)", lambda found: b"\x01" * len(found[0]), source)
    for block in re.finditer(rb"(?ms)^[^\n}][^\n]*(?:%b)[^\n]*\{.*?^\}" % within.encode(), code):
        at = block.start()
        for symbol, other in zip(*map(str.split, SYMBOLS), strict=True):
            for found in re.finditer(re.escape(f" {symbol} ".encode()), block[0]):
                yield at + found.start(), at + found.end(), f" {other} ".encode()
        for found in re.finditer(rb"(?<![\w.])(\d+)(?=[;,)\] ]|\.0f?\b)", block[0]):
            yield at + found.start(1), at + found.end(1), b"%d" % (int(found[1]) + 1)
        statement = rb"(?m)^ +((?:[\w.>\[\]-]+ [+*|-]?= [^;{\n]+|(?!return)[\w.:>-]+\([^;{\n]*\));)$"
        for found in re.finditer(statement, block[0]):
            yield at + found.start(1), at + found.end(1), b";"


def edits_of(path: Path, within: str) -> Iterator[Edit]:
    return (edits_of_python if path.suffix == ".py" else edits_of_cpp)(path.read_bytes(), within)


def run(subject: Subject, at: Path, limit: float | None = None) -> str | None:
    """Why the tests fail, None where they do not."""
    if subject.build and subprocess.run(subject.build, shell=True, cwd=at, capture_output=True).returncode:
        return UNBUILT
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(at), "PYTHONDONTWRITEBYTECODE": "1", **subject.environment}
    for test in subject.tests:
        command += sorted(str(path) for path in at.glob(test)) if test.startswith("tests/") else [test]
    try:
        done = subprocess.run(command, cwd=at, env=environment, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"takes more than {limit:.0f} s"
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", done.stdout.decode())
    return None if done.returncode == 0 else " ".join(failed) or f"pytest ended with {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5, help="mutants of each")
    parser.add_argument("--at", type=Path, help="a copy of the checkout that is there already")
    arguments = parser.parse_args()
    at = arguments.at
    if at is None:
        at = Path(tempfile.mkdtemp()) / "mutants"
        shutil.copytree(ROOT, at, ignore=shutil.ignore_patterns(".git", ".venv", "torch-*", "*.pyc"), symlinks=True)
    for name in arguments.names or SUBJECTS:
        subject, killed, tried, begun = SUBJECTS[name], 0, 0, time.monotonic()
        why = run(subject, at)
        if why is not None:
            print(f"{name}: fails as it is: {why}", flush=True)
            continue
        limit = 60 + 5 * (time.monotonic() - begun)
        files = [path for pattern in subject.sources for path in sorted(at.glob(pattern))]
        places = [(path, edit) for path in files for edit in edits_of(path, subject.within)]
        random.Random(f"{name} {arguments.seed}").shuffle(places)
        for path, (start, end, text) in places:
            source = path.read_bytes()
            path.write_bytes(source[:start] + text + source[end:])
            try:
                why = run(subject, at, limit)
            finally:
                path.write_bytes(source)
            if why == UNBUILT:
                continue
            tried, killed = tried + 1, killed + (why is not None)
            what = f"{path.relative_to(at)}:{source[:start].count(10) + 1}: {source[start:end].decode()!r}"
            print(f"  {'killed' if why else 'SURVIVES'} {what} -> {text.decode()!r}   {why or ''}", flush=True)
            if tried == arguments.count:
                break
        if subject.build:
            subprocess.run(subject.build, shell=True, cwd=at, capture_output=True)
        print(f"{name}: {killed} of {tried} killed, of {len(places)} places", flush=True)


if __name__ == "__main__":
    main()
