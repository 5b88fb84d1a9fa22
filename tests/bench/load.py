"""Measure how fast, and in how much memory, redpipe.pyz imports a file of posts.

    .venv/bin/python tests/bench/load.py [POSTS [ROUNDS]]      default: 100000 3

Every round runs each command once on the same file, so that a busy moment of the machine
strikes them all; the table gives medians, also of the rounds' ratios. Memory is then
measured at 10,000 and at 1,000,000 posts, which are piped in as they are made up, and what
--recheck takes to find that none of them is due.

The posts are the recorded ones of REDPIPE_SAMPLES with ids and times of their own, over and
over; without REDPIPE_SAMPLES, invented ones of about the same sizes. "One subreddit" is the
largest that has at most one post in twenty. sqlite-utils and DuckDB are installed for the
occasion; jq and sqlite3 take part where they are. DuckDB may use all processors, and makes a
table of its own without a key. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import platform
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from operator import itemgetter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from start import Run, build_here, make_venv, run_timed, show, verdict

from artefact import bare_environment, make_bare
from fake_reddit import make_post

SQLITE_UTILS = "sqlite-utils==4.2.1"
DUCKDB = "duckdb==2.0.1"
FEW, MANY = 10_000, 1_000_000
MOST_TIMES_BARE = 1.3
LEAST_TIMES_SQLITE_UTILS = 8.0
MOST_TIMES_WHOLE = 0.35  # of the processor's time, for one subreddit
LARGEST_SHARE = 0.05
MOST_GROWTH = 5_000_000  # bytes
MOST_SECONDS = 2.0  # for --recheck to find that none of MANY posts is due
FIRST_UTC = 1_790_000_000
ENVIRONMENT = bare_environment(LC_ALL="C.UTF-8", REDDIT_CLIENT_ID="never-asked")

REDPIPE = "`redpipe.pyz --from`"
AGAIN = "the same file again"
FILTERED = "`redpipe.pyz --from`, one subreddit"
BARE = "bare loop"
UTILS = "`sqlite-utils insert --nl --ignore --pk id --alter`"
UTILS_OPTIONS = ["--nl", "--ignore", "--pk", "id", "--alter", "--silent"]
JQ = "`jq -r … @csv \\| sqlite3 .import`"

DUCK = "DuckDB `read_ndjson`"
DUCK_FILTERED = "DuckDB `read_ndjson`, one subreddit"

DUCKDB_SCRIPT = """
import duckdb, sys
file, database, *name = sys.argv[1:]
columns = "id created_utc subreddit title author_fullname author permalink".split()
types = {column: "DOUBLE" if column == "created_utc" else "VARCHAR" for column in columns}
duckdb.connect(database).execute(
    f"CREATE TABLE posts AS SELECT {', '.join(columns)} FROM read_ndjson(?, columns={types})"
    + " WHERE lower(subreddit) = ?" * len(name), [file, *name]
)
"""

JQ_PIPE = """
jq -r '[.id, .created_utc, .subreddit, .title, .author_fullname, .author, .permalink] | @csv' "$1" |
sqlite3 "$2" \\
    'CREATE TABLE posts (id TEXT PRIMARY KEY, created_utc INTEGER, subreddit TEXT, title TEXT,
        author TEXT, author_name TEXT, permalink TEXT)' \\
    'CREATE INDEX posts_created_utc ON posts (created_utc)' '.mode csv' '.import /dev/stdin posts'
"""

# --- posts

MARK_ID, MARK_TIME = "zzzidzzz", 7_777_777_777_777_777


def template(post: dict[str, Any]) -> list[bytes]:
    """Write a post as JSON, split where its time belongs."""
    marked = {**post, "id": MARK_ID, "name": f"t3_{MARK_ID}", "created_utc": MARK_TIME}
    head, tail = json.dumps(marked).encode().split(str(MARK_TIME).encode())
    return [head, tail + b"\n"]


def invented_posts(count: int = 5000) -> Iterator[dict[str, Any]]:
    """Invent posts of 3.1 kB in the middle, and 16 kB at the upper hundredth.

    Half of them have pictures: many small objects with long addresses.
    """
    dice = random.Random(1)
    for n in range(count):
        bytes_left = int(dice.lognormvariate(math.log(3100), 0.7)) - 1600
        pictures = max(0, bytes_left) // 2 // 150 if n % 2 else 0
        words = "Nobody wrote this. " * (max(0, bytes_left - 150 * pictures) // 19)
        urls = [f"https://preview.example.org/{dice.randbytes(40).hex()}" for _ in range(pictures)]
        images = [{"url": url, "width": dice.randrange(100, 2000), "height": 500} for url in urls]
        yield make_post(n, subreddit=f"subreddit_{n % 30}", selftext=words, preview=images)


def templates() -> list[list[bytes]]:
    if samples := os.environ.get("REDPIPE_SAMPLES"):
        with lzma.open(Path(samples) / "posts.ndjson.xz", "rt", encoding="utf-8") as file:
            return [template(json.loads(line)) for line in file]
    return [template(post) for post in invented_posts()]


def made_up(forms: list[list[bytes]], count: int) -> Iterator[bytes]:
    """Yield so many posts as lines; each has an id and a time of its own."""
    mark = MARK_ID.encode()
    for n, (head, tail) in enumerate(islice(cycle(forms), count)):
        identifier = b"%07d" % (1_000_000 + n)
        time = b"%d.0" % (FIRST_UTC + n // 17)
        yield head.replace(mark, identifier) + time + tail.replace(mark, identifier)


def one_subreddit(forms: list[list[bytes]], count: int) -> tuple[str, int]:
    """Return the largest subreddit of at most LARGEST_SHARE, and how many posts it has."""
    made = (json.loads(head + b"0" + tail) for head, tail in islice(cycle(forms), count))
    sizes = Counter(str(post.get("subreddit")).lower() for post in made)
    del sizes["none"]
    small = {name: size for name, size in sizes.items() if size <= LARGEST_SHARE * count}
    return max(small.items(), key=itemgetter(1))


def sizes_of(forms: list[list[bytes]]) -> str:
    """Describe the posts."""
    lengths = [len(head) + len(tail) for head, tail in forms]
    kind = "recorded" if os.environ.get("REDPIPE_SAMPLES") else "invented"
    return f"{kind}, median {median(lengths):,.0f} bytes, p99 {quantiles(lengths, n=100)[98]:,.0f}"


# --- runs


def remove(database: Path) -> None:
    for path in database.parent.glob(f"{database.name}*"):
        path.unlink()


def measure(commands: dict[str, list[str]], database: Path, rounds: int) -> dict[str, list[Run]]:
    """Run all commands in turn, `rounds` times after a first one."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            if name != AGAIN:
                remove(database)
            os.sync()  # nobody waits for what another one has left to be written
            run = run_timed(command, ENVIRONMENT)
            if turn:
                runs[name].append(run)
    return runs


def commands_of(
    work: Path, python: Path, file: Path, database: Path, subreddit: str
) -> dict[str, list[str]]:
    """Name the commands that are measured, in their order."""
    paths = [str(file), str(database)]
    redpipe = [str(python), str(work / "redpipe.pyz"), f"--from={file}", str(database)]
    bare_loop = str(Path(__file__).with_name("bare_loop.py"))
    utils = [str(make_venv(work / "utils", SQLITE_UTILS) / "sqlite-utils"), "insert"]
    duck = [str(make_venv(work / "duck", DUCKDB) / "python3"), "-I", "-c", DUCKDB_SCRIPT, *paths]
    commands = {
        BARE: [str(python), "-I", bare_loop, *paths],
        REDPIPE: redpipe,
        AGAIN: redpipe,
        FILTERED: [*redpipe, subreddit],
        DUCK: duck,
        DUCK_FILTERED: [*duck, subreddit],
        UTILS: [*utils, str(database), "posts", str(file), *UTILS_OPTIONS],
    }
    if shutil.which("jq") and shutil.which("sqlite3"):
        commands[JQ] = ["/bin/sh", "-c", JQ_PIPE, "sh", *paths]
    return commands


# --- the tables


def times(runs: dict[str, list[Run]], one: str, other: str, what: str = "seconds") -> float:
    """Return how many times as long `one` took as `other`: the median of the rounds."""
    pairs = zip(runs[one], runs[other], strict=True)
    return median(getattr(first, what) / getattr(second, what) for first, second in pairs)


def speed_rows(runs: dict[str, list[Run]], posts: int) -> list[str]:
    """Write the table of commands."""
    slower = times(runs, REDPIPE, BARE)
    faster = times(runs, UTILS, REDPIPE)
    part = times(runs, FILTERED, REDPIPE, "cpu")
    of_duck = times(runs, FILTERED, DUCK_FILTERED, "cpu")
    bars = {
        REDPIPE: f"at most {MOST_TIMES_BARE} x: {verdict(slower <= MOST_TIMES_BARE)}",
        FILTERED: f"at most {MOST_TIMES_WHOLE} x the CPU of the whole: {part:.2f} x, "
        + verdict(part <= MOST_TIMES_WHOLE)
        + f"; less CPU than DuckDB: {of_duck:.2f} x, {verdict(of_duck < 1)}",
        UTILS: f"redpipe at least {LEAST_TIMES_SQLITE_UTILS:g} x as fast: {faster:.1f} x, "
        + verdict(faster >= LEAST_TIMES_SQLITE_UTILS),
    }
    rows = [
        "| import | seconds | CPU s | posts/s | peak MB | x bare loop | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, done in runs.items():
        seconds, cpu, peak = (median(values) for values in zip(*done, strict=True))
        rows.append(
            f"| {name} | {seconds:.2f} | {cpu:.2f} | {posts / seconds:,.0f} | {peak / 1e6:.1f} "
            f"| {times(runs, name, BARE):.2f} | {bars.get(name, '')} |"
        )
    return rows


def memory_rows(what: str, few: Run, many: Run, most_seconds: float = math.inf) -> list[str]:
    """Write the table of memory, or of time and memory."""
    grown = many.peak - few.peak
    bar = f"at most {MOST_GROWTH / 1e6:g} MB more: {grown / 1e6:.1f}, "
    bar += verdict(grown <= MOST_GROWTH)
    if most_seconds < math.inf:
        bar += f"; at most {most_seconds:g} s: {verdict(many.seconds <= most_seconds)}"
    rows = [f"| {what} | seconds | CPU s | peak MB | bar |", "|---|---|---|---|---|"]
    for posts, run, its_bar in ((FEW, few, ""), (MANY, many, bar)):
        measured = f"{run.seconds:.1f} | {run.cpu:.1f} | {run.peak / 1e6:.1f}"
        rows.append(f"| {posts:,} posts | {measured} | {its_bar} |")
    return rows


def main() -> int:
    """Measure everything, print the tables, and tell whether all bars are met."""
    posts, rounds = (*map(int, sys.argv[1:]), *(100_000, 3)[len(sys.argv) - 1 :])
    forms = templates()
    subreddit, selected = one_subreddit(forms, posts)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        build_here(work / "redpipe.pyz")
        python = make_bare(sys.executable, work / "bare")
        file, database = work / "posts.ndjson", work / "posts.db"
        with file.open("wb") as dump:
            dump.writelines(made_up(forms, posts))
        megabytes = file.stat().st_size / 1e6
        commands = commands_of(work, python, file, database, subreddit)
        runs = measure(commands, database, rounds)
        piped, asked = (
            [str(python), str(work / "redpipe.pyz"), option, str(database)]
            for option in ("--from=-", "--recheck=24")
        )
        remove(database)
        few = run_timed(piped, ENVIRONMENT, made_up(forms, FEW))
        few_asked = run_timed(asked, ENVIRONMENT)
        remove(database)
        many = run_timed(piped, ENVIRONMENT, made_up(forms, MANY))
        many_asked = min(run_timed(asked, ENVIRONMENT) for _ in range(rounds))
    return show(
        f"CPython {platform.python_version()}, {posts:,} posts ({sizes_of(forms)}; "
        f"{megabytes:,.0f} MB), one subreddit with {100 * selected / posts:.1f} % of them, "
        f"{os.cpu_count()} processors, medians of {rounds} rounds",
        "",
        *speed_rows(runs, posts),
        "",
        *memory_rows("`--from=-`", few, many),
        "",
        *memory_rows("`--recheck=24`, none is due", few_asked, many_asked, MOST_SECONDS),
    )


if __name__ == "__main__":
    raise SystemExit(main())
