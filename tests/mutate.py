"""Plant faults in the program, one at a time, and see which test finds each.

    .venv/bin/python tests/mutate.py [FAULTS [SEED [SECONDS]]]      default: 60 1 120

Faults are drawn from four kinds, as many of each: a comparison turned around, a constant
changed, a branch always, never or wrongly taken, a statement left out. First the tests must
pass without any, which tells how long each takes. Then each fault is planted in a copy of the
checkout, whose tests run one after the other, the quickest first, until one fails; what no test
finds within SECONDS survives. A fault that makes a test hang is found, too. 60 faults take half
an hour on two cores. Exits with 1 if a test fails without a fault.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("pipeline.py", "__main__.py")
HANGS = 60  # seconds beyond three times what a test took
OVER = "the time is over"
MOST_MEMORY = 2**32  # bytes
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.db", "*.pyz")
DELETABLE = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Continue, ast.Break)
TURNED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class Fault(NamedTuple):
    """What stands in the place of a node of a module."""

    kind: str
    module: str
    node: Any
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split())[:50] for text in (ast.unparse(self.node), self.new))
        return f"{self.module}:{self.node.lineno} {self.kind}: `{old}` -> `{new}`"

    def planted(self, source: str) -> str:
        """Return the module with the fault; what stands below it keeps its lines."""
        lines = source.encode().splitlines(keepends=True)
        first, last = self.node.lineno - 1, self.node.end_lineno - 1
        begin, end = lines[first][: self.node.col_offset], lines[last][self.node.end_col_offset :]
        below = "\n" * (last - first)
        new = f"({self.new}{below})" if isinstance(self.node, ast.expr) else self.new + below
        lines[first : last + 1] = [begin + new.encode() + end]
        return b"".join(lines).decode()


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that do something when the program runs."""
    for child in ast.iter_child_nodes(node):
        text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        logs = isinstance(child, ast.Expr) and ast.unparse(child).startswith("log.debug")
        # Places inside a formatted string are wrong before Python 3.12.
        if not (text or types or logs or isinstance(child, ast.JoinedStr)):
            yield child
            yield from nodes_of(child)


def faults_of(module: str, source: str) -> Iterator[Fault]:
    """Yield every fault that can be planted in a module."""
    for node in nodes_of(ast.parse(source)):
        if isinstance(node, ast.Compare):
            turned = [TURNED[type(node.ops[0])](), *node.ops[1:]]
            new = ast.unparse(ast.Compare(node.left, turned, node.comparators))
            yield Fault("comparison", module, node, new)
        elif isinstance(node, ast.BoolOp):
            new = ast.unparse(ast.BoolOp(TURNED[type(node.op)](), node.values))
            yield Fault("comparison", module, node, new)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            new = f"{not node.value}" if isinstance(node.value, bool) else f"{node.value + 1}"
            yield Fault("constant", module, node, new)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            for new in (f"not ({ast.unparse(node.test)})", "True", "False"):
                yield Fault("branch", module, node.test, new)
        elif isinstance(node, DELETABLE):
            yield Fault("statement", module, node, "pass")


def draw(count: int, seed: int) -> list[Fault]:
    """Draw faults, as many of each kind, in the order of the program."""
    dice = random.Random(seed)
    kinds: dict[str, list[Fault]] = {}
    for module in MODULES:
        for fault in faults_of(module, (ROOT / module).read_text("utf-8")):
            kinds.setdefault(fault.kind, []).append(fault)
    orders = [dice.sample(kinds[kind], len(kinds[kind])) for kind in sorted(kinds)]
    drawn = [fault for one_of_each in zip(*orders, strict=False) for fault in one_of_each]
    return sorted(drawn[:count], key=lambda fault: (fault.module, fault.node.lineno))


def run_tests(tree: Path, seconds: float, durations: Path, *options: str) -> str:
    """Run the tests of a copy; return the first that fails, what went wrong, or nothing."""
    command = [sys.executable, "tests/mutate.py", "--run", str(durations), str(seconds), *options]
    process = subprocess.Popen(
        command, cwd=tree, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=seconds + 120)
    except subprocess.TimeoutExpired:
        return "(everything hangs)"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", out, re.MULTILINE)
    if failed:
        return failed[1]
    if process.returncode == 0 or OVER in out:
        return ""
    return f"(cannot be started: {out[-100:].strip()})"


class Plugin:
    """Put the quickest tests first, let none take much longer than it did, and end in time."""

    def __init__(self, durations: Path, seconds: float) -> None:
        self.file, self.ends = durations, time.monotonic() + seconds
        self.known: dict[str, float] = {}
        if durations.exists():
            self.known = json.loads(durations.read_text("utf-8"))
        self.taken: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.known:
            items.sort(key=lambda item: self.known.get(item.nodeid, 1.0))
        for item in items if self.known else ():
            seconds = HANGS + 3 * self.known.get(item.nodeid, 1.0)
            item.add_marker(pytest.mark.timeout(seconds), append=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.taken[report.nodeid] += report.duration

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.ends:
            item.session.shouldstop = OVER

    def pytest_sessionfinish(self) -> None:
        if not self.known:
            self.file.write_text(json.dumps(self.taken), "utf-8")


def main(count: int = 60, seed: int = 1, seconds: float = 120) -> int:
    """Plant the faults, and print a line for each and their sum."""
    with tempfile.TemporaryDirectory(prefix="redpipe-faults-") as scratch:
        durations = Path(scratch, "durations")

        def find(number: int, fault: Fault | None) -> str:
            tree = Path(shutil.copytree(ROOT, Path(scratch, str(number)), ignore=NOT_COPIED))
            if not fault:
                return run_tests(tree, 3600, durations, "-n", "auto")
            module = tree / fault.module
            module.write_text(fault.planted(module.read_text("utf-8")), "utf-8")
            found = run_tests(tree, seconds, durations, "-x", "-n0")
            shutil.rmtree(tree)
            return found

        if failed := find(0, None):
            sys.exit(f"fails without a fault: {failed}")
        sums = Counter[tuple[str, bool]]()
        faults = draw(count, seed)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for fault, found in zip(
                faults, pool.map(find, range(1, count + 1), faults), strict=True
            ):
                sums[fault.kind, bool(found)] += 1
                print(f"{found or 'SURVIVED':<80.80} {fault}", flush=True)
    for kind in sorted({kind for kind, _ in sums}):
        print(f"{kind}: {sums[kind, True]} of {sums[kind, True] + sums[kind, False]} found")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
        plugin = Plugin(Path(sys.argv[2]), float(sys.argv[3]))
        options = ["-c", "tests/pyproject.toml", "-q", "--tb=no", "-p", "no:cacheprovider"]
        sys.exit(pytest.main([*options, *sys.argv[4:]], plugins=[plugin]))
    sys.exit(main(*map(int, sys.argv[1:])))
