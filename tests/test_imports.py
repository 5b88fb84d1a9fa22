"""Imports beside others, and imports that are killed: every post is there, once."""

from __future__ import annotations

import json
import random
import subprocess
import time
from contextlib import suppress

import pytest

from artefact import wait_for
from conftest import count_posts, finish, query, stored
from fake_reddit import Budget, make_post


def write_posts(path, numbers):
    """Write small posts, whose ids are their numbers."""
    with path.open("w") as file:
        for n in numbers:
            file.write(f'{{"name": "t3_{n}", "title": "Post {n}", "created_utc": {n}}}\n')
    return path


def assert_stored_once(database, number):
    """Check that the posts are those of 0 to `number`, each once and whole."""
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
    assert query(
        database,
        "SELECT count(*), count(DISTINCT id), min(created_utc), max(created_utc),"
        " sum(created_utc = id AND title = 'Post ' || id) FROM posts",
    ) == [(number, number, 0, number - 1, number)]


def test_a_file_is_imported_while_reddit_is_followed(redpipe, fake_reddit, file, database):
    fake_reddit.budgets["json"] = Budget(total=10_000)
    now = int(time.time())
    # The file has what is listed, what will be listed, and what no longer is.
    posts = {n: make_post(n, now - 200 + n, selftext="x" * 2000) for n in range(-9_000, 401)}
    for n in range(100):
        fake_reddit.add(posts[n])
    follower = redpipe.start("--interval=1", database, "python")
    wait_for(lambda: count_posts(database) >= 100)
    file.write_text("".join(json.dumps(posts[n]) + "\n" for n in range(-9_000, 400)))
    imported = redpipe.start(f"--from={file}", database)
    for n in range(100, 300):
        fake_reddit.add(posts[n])
        time.sleep(0.005)
    assert finish(imported) == (0, "", "")
    fake_reddit.add(make_post(400, now))
    wait_for(lambda: count_posts(database) == 9_401)
    assert redpipe.stop(follower).err == ""
    assert sorted(stored(database)) == sorted(post["id"] for post in posts.values())
    cursor = query(database, f"SELECT subreddit, newest_utc >= {now - 100} FROM cursors")
    assert cursor == [("python", 1)]
    assert query(database, "SELECT * FROM gaps") == []


def test_two_imports_at_once_that_overlap(redpipe, tmp_path, database):
    first = write_posts(tmp_path / "first.ndjson", range(6_000))
    second = write_posts(tmp_path / "second.ndjson", [*range(8_999, 2_999, -1), *range(3_000)])
    imports = [redpipe.start(f"--from={file}", database) for file in (first, second, first)]
    assert [finish(process, timeout=60) for process in imports] == [(0, "", "")] * 3
    assert_stored_once(database, 9_000)


@pytest.mark.parametrize(
    "number",
    [15_000, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],
)
def test_an_import_killed_five_times_is_finished_by_a_last_one(
    redpipe, tmp_path, file, database, seed, number
):
    write_posts(file, range(number))
    began = time.monotonic()
    assert redpipe(f"--from={file}", tmp_path / "whole.db", timeout=600) == (0, "", "")
    whole, dice, killed = time.monotonic() - began, random.Random(seed), 0
    for fifths in range(1, 6):
        process = redpipe.start(f"--from={file}", database)
        with suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0, whole * fifths / 5))
        killed += process.poll() is None
        process.kill()
        process.communicate()
        print(f"{count_posts(database)} posts after a kill")
    assert killed > 0
    assert redpipe(f"--from={file}", database, timeout=600) == (0, "", "")
    assert_stored_once(database, number)
