"""Measure how fast redpipe.pyz starts, how large it is, and how long building it takes.

    .venv/bin/python tests/bench/start.py [ROUNDS]

Every round runs each command once, so that a busy moment of the machine strikes them all;
a ratio is the median of the rounds' ratios. Builds with the Python that runs this, and for
"foreign bytecode" with one of another minor version, when there is one (see REDPIPE_PYTHONS
in test_pyz.py).
Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from artefact import ROOT, bare_environment, build, find_pythons, make_bare
from fake_reddit import FakeReddit, make_post

PASS = "`python3 -c pass`"
REQUESTS = '`python3 -c "import requests"`'

# A process's peak counts that of the process it was forked from. So the clock is held by
# an interpreter as small as can be, not by this one.
STOPWATCH = """
import posix, sys, time
quiet = [(posix.POSIX_SPAWN_OPEN, 1, "/dev/null", posix.O_WRONLY, 0)]
start = time.perf_counter()
process = posix.posix_spawn(sys.argv[1], sys.argv[1:], posix.environ, file_actions=quiet)
_, status, usage = posix.wait4(process, 0)
seconds = time.perf_counter() - start
print(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, status)
"""


class Run(NamedTuple):
    """What one command took: seconds on the wall, of the processor, and bytes at the peak."""

    seconds: float
    cpu: float
    peak: float


BARS = {  # how many times as long as a reference a command may take
    "`--version`": {PASS: 3.0, REQUESTS: 0.27},
    "`--help`": {PASS: 3.0, REQUESTS: 0.27},
    "`--once`, nothing new": {REQUESTS: 1.3},
}
LARGEST = 1_200_000  # bytes
LONGEST_BUILD = 3.0  # seconds


def build_here(output: Path, python: str = sys.executable) -> float:
    """Build, and return the seconds it took."""
    start = time.perf_counter()
    done = build(output, python=python)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return seconds


def make_venv(directory: Path, *requirements: object) -> Path:
    """Install packages into an environment of their own; return where its programs are."""
    pip = [directory / "bin/python3", "-m", "pip", "install", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", directory], [*pip, "--quiet", *requirements]):
        subprocess.run(command, check=True, timeout=300)
    return directory / "bin"


def foreign_python() -> str | None:
    """Find a Python of another minor version that can build too."""
    versions = [p for p in find_pythons() if (3, 10) <= p.version[:2] != sys.version_info[:2]]
    return versions[-1].path if versions else None


def run_timed(command: list[str], environment: dict[str, str], lines: Iterable[bytes] = ()) -> Run:
    """Run a command once, to a good end; `lines` go to its standard input."""
    stopwatch = [sys.executable, "-I", "-S", "-c", STOPWATCH, *command]
    with subprocess.Popen(
        stopwatch, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.writelines(lines)
        out, _ = process.communicate(timeout=3600)
    seconds, cpu, peak, status = out.split()
    if status != b"0":
        sys.exit(f"status {status.decode()}: {' '.join(command)}")
    return Run(float(seconds), float(cpu), float(peak))


def measure(
    commands: dict[str, list[str]], environment: dict[str, str], rounds: int
) -> dict[str, list[Run]]:
    """Run all commands in turn, `rounds` times after a first one that does not count."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            runs[name].append(run_timed(command, environment))
    return {name: done[1:] for name, done in runs.items()}


def ratio(runs: list[Run], reference: list[Run]) -> float:
    """Compare the times of two commands, round by round."""
    return median(run.seconds / other.seconds for run, other in zip(runs, reference, strict=True))


def commands_of(pyz: Path, python: Path, suffix: str, database: Path) -> dict[str, list[str]]:
    """Name the commands that are measured on one build."""
    run = [str(python), str(pyz)]
    return {
        f"`--version`{suffix}": [*run, "--version"],
        f"`--help`{suffix}": [*run, "--help"],
        f"`--once`, nothing new{suffix}": [*run, "--once", str(database), "python"],
    }


def verdict(met: bool) -> str:
    return "met" if met else "**MISSED**"


def at_most(value: float, limit: float, unit: str) -> str:
    """Write a bar, and whether it is met."""
    return f"at most {limit:g} {unit}: {verdict(value <= limit)}"


def show(*table: str) -> int:
    """Print a table; return the exit status."""
    print(*table, sep="\n")
    return 1 if "MISSED" in "".join(table) else 0


def start_rows(measured: dict[str, list[Run]]) -> list[str]:
    """Write the table of start-up times."""
    rows = [
        f"| command | ms | x {PASS} | x {REQUESTS} | peak MiB | bar |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in measured.items():
        ratios = {other: ratio(runs, measured[other]) for other in (PASS, REQUESTS)}
        bars = [at_most(ratios[other], limit, "x") for other, limit in BARS.get(name, {}).items()]
        milliseconds = 1000 * median(run.seconds for run in runs)
        peak = median(run.peak for run in runs) / 2**20
        rows.append(
            f"| {name} | {milliseconds:.1f} | {ratios[PASS]:.2f} | {ratios[REQUESTS]:.2f} "
            f"| {peak:.1f} | {'; '.join(bars)} |"
        )
    return rows


def build_rows(size: int, seconds: float) -> list[str]:
    """Write the table of the build."""
    return [
        "| build | measured | bar |",
        "|---|---|---|",
        f"| size | {size / 1e6:.3f} MB | {at_most(size / 1e6, LARGEST / 1e6, 'MB')} |",
        f"| time, warm cache | {seconds:.2f} s | {at_most(seconds, LONGEST_BUILD, 's')} |",
    ]


def serve_posts() -> FakeReddit:
    """Serve a full page of posts that are some hours old."""
    reddit = FakeReddit()
    for number in range(100):
        reddit.add(make_post(number, created_utc=int(time.time()) - 20_000 + 100 * number))
    return reddit


def main() -> int:
    """Measure everything, print the tables, and tell whether all bars are met."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    with tempfile.TemporaryDirectory() as name, serve_posts() as reddit:
        work = Path(name)
        (work / "tmp").mkdir()
        environment = bare_environment(REDPIPE_URL=reddit.url, TMPDIR=str(work / "tmp"))
        pyz, database = work / "redpipe.pyz", work / "posts.db"
        build_here(pyz)  # fills pip's cache
        build_seconds = min(build_here(pyz) for _ in range(3))  # the bar is no ratio
        bare = make_bare(sys.executable, work / "bare")
        plain = make_venv(work / "plain", "--require-hashes", "-r", ROOT / "requirements.txt")
        commands = {
            PASS: [str(bare), "-c", "pass"],
            REQUESTS: [str(plain / "python3"), "-c", "import requests"],
            **commands_of(pyz, bare, "", database),
        }
        if foreign := foreign_python():
            build_here(work / "foreign.pyz", foreign)
            commands.update(commands_of(work / "foreign.pyz", bare, ", foreign bytecode", database))
        run_timed(commands["`--once`, nothing new"], environment)
        return show(
            f"CPython {platform.python_version()}, medians of {rounds} rounds",
            "",
            *start_rows(measure(commands, environment, rounds)),
            "",
            *build_rows(pyz.stat().st_size, build_seconds),
        )


if __name__ == "__main__":
    raise SystemExit(main())
