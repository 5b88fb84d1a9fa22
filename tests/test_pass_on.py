"""README's lines that pass posts on, as typed: only paths and the broker are replaced."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from artefact import readme_blocks
from conftest import Done
from fake_reddit import make_post

pytestmark = pytest.mark.timeout(60)


def block(word: str) -> str:
    """Return README's one block that names a program."""
    (found,) = [block for block in readme_blocks() if word in block]
    return found


def needs(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


@pytest.fixture
def shell(redpipe, tmp_path):
    """Return what runs a line of README in a folder with `redpipe.pyz` and its own PATH."""

    def run(line: str) -> Done:
        process = redpipe.start_through("bash", "-c", "set -o pipefail\n" + line)
        out, err = process.communicate(timeout=30)
        return Done(process.returncode, out, err)

    (tmp_path / "bin").mkdir()
    redpipe.environment["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    script(tmp_path / "redpipe.pyz", f'exec {" ".join(redpipe.command)} "$@"')
    return run


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def add_posts(fake_reddit, *titles, **fields):
    now = int(time.time()) - 1000
    return [
        fake_reddit.add(make_post(n, now + n, title=title, **fields))["id"]
        for n, title in enumerate(titles, len(fake_reddit.listing_ids()))
    ]


def once(line: str) -> str:
    """Make a line that follows come to an end."""
    return line.replace("--print", "--print --once", 1)


def test_jq_picks_and_a_program_tells(shell, fake_reddit, tmp_path):
    needs("jq")
    fake_reddit.create("rust")
    add_posts(fake_reddit, "Nothing", "Asyncio in anger", 'Of "tokio" & <others>')
    add_posts(fake_reddit, *["Mine"] * 4, link_flair_text="Showcase")
    script(tmp_path / "bin" / "notify-send", 'echo "$1" >> told.txt')
    assert shell(once(block("notify-send"))) == (0, "", "")
    told = (tmp_path / "told.txt").read_text().splitlines()
    titles = [line.partition(" https://www.reddit.com/r/python/comments/")[0] for line in told]
    assert sorted(titles) == ["Asyncio in anger", *["Mine"] * 4, 'Of "tokio" & <others>']


def test_kcat_takes_it_into_kafka(shell, fake_reddit):
    needs("jq", "kcat")
    fake_reddit.create("rust")
    ids = add_posts(fake_reddit, "One", "Zwei \u2028", 'Three "quotes"')
    line = once(block("kcat")).replace("-b broker:9092", "-b x -T -X test.mock.num.brokers=3")
    done = shell(line)
    assert done.status == 0, done.err
    assert re.findall(r"(\w+)\t\{", done.out) == ids
    assert "Mock cluster enabled" in done.err


def test_duckdb_stores_it_and_nothing_twice(shell, fake_reddit, tmp_path):
    needs("duckdb")
    fake_reddit.create("rust")
    ids = add_posts(fake_reddit, "One", "Zwei", 'Three "quotes"')
    for _ in range(2):
        done = shell(block("duckdb"))
        assert (done.status, done.err) == (0, "")
        (tmp_path / "posts.db").unlink()
    sql = "COPY (SELECT id FROM posts ORDER BY created_utc) TO '/dev/stdout' (FORMAT csv)"
    assert shell(f'duckdb reddit.duckdb "{sql}"').out.split()[1:] == ids
