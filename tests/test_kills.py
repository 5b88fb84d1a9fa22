"""Kill the built file at random moments: nothing listed is lost, nothing comes twice."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import time
from pathlib import Path

import pytest

from conftest import stored
from fake_reddit import Budget, FakeReddit, make_post


def add_posts(reddit: FakeReddit, first: int, count: int, start: float) -> None:
    """List posts that are half a second apart."""
    for n in range(first, first + count):
        reddit.add(make_post(n, start + (n - first) / 2, "python"))


def kill_often(redpipe, reddit: FakeReddit, path, kills: int, rng: random.Random) -> int:
    """Start a follower and kill it, again and again; give how many died between two pages.

    Before each start 20 to 400 posts are listed, and a page takes 30 ms, so that most are
    killed in the middle of a catch-up. The listing is never longer than what Reddit lists.
    """
    midway = first = 0
    reddit.budgets["json"] = Budget(total=1_000_000)
    reddit.faults = lambda method, path, query: time.sleep(0.03)
    now = time.time() - 3600 * 24
    for _ in range(kills):
        count = rng.randrange(20, 400)
        add_posts(reddit, first, count, now)
        first, now = first + count, now + count / 2
        for post_id in reddit.listing_ids("python")[900:]:
            reddit.remove(post_id)
        process = redpipe.start("--interval=1", path, "python")
        wait_for_requests(reddit, len(reddit.requests()) + rng.randrange(10))
        time.sleep(rng.uniform(0.0, 0.04))
        assert process.poll() is None
        process.kill()
        process.communicate()
        midway += bool(reddit.requests()) and "after" in reddit.requests()[-1].query
    print(f"{midway} of {kills} kills came between two pages")
    return midway


def wait_for_requests(reddit: FakeReddit, number: int) -> None:
    """Wait until so many pages have been asked for; not for long, a walk may have fewer."""
    ends = time.monotonic() + 1.5
    while len(reddit.requests()) < number and time.monotonic() < ends:
        time.sleep(0.002)


def check(redpipe, reddit: FakeReddit, path) -> None:
    """Let a last run end in peace: every listed post is there, once."""
    # Many kills in a row can push posts out of the listing: then it warns of a gap.
    assert redpipe("--once", path, "python").status == 0
    kept = stored(path)
    assert len(kept) == len(set(kept))
    assert not set(reddit.listing_ids("python")) - set(kept)


def test_ten_kills_lose_nothing_that_is_listed(redpipe, fake_reddit, tmp_path, seed):
    path = tmp_path / "posts.db"
    kill_often(redpipe, fake_reddit, path, 10, random.Random(seed))
    check(redpipe, fake_reddit, path)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_kills_lose_nothing_that_is_listed(redpipe, fake_reddit, tmp_path, seed):
    path = tmp_path / "posts.db"
    assert kill_often(redpipe, fake_reddit, path, 200, random.Random(seed)) > 60
    check(redpipe, fake_reddit, path)


def follow_many(redpipe, reddit: FakeReddit, path, names: list[str], seconds: float) -> None:
    """Follow names of a post a minute, and five of one a second; kill it thrice, end in peace."""
    reddit.budgets["json"] = Budget(total=1_000_000)
    weights = names[:5] * 60 + names[5:]
    reddit.grow(len(weights) / 60, weights, start=time.time() - 300)
    for _ in range(3):
        process = redpipe.start(path, *names)
        time.sleep(seconds / 3)
        assert process.poll() is None
        walks = sum("after" not in seen.query for seen in reddit.requests())
        print(costs(process.pid), f"{len(reddit.requests())} requests, {walks} walks in all")
        process.kill()
        process.communicate()
    listed = {post_id for name in names for post_id in reddit.listing_ids(name)}
    assert redpipe("--once", path, *names, timeout=300) == (0, "", "")
    assert listed <= set(stored(path))
    assert len(listed) > seconds * 4


def costs(pid: int) -> str:
    """Say what a process has taken so far."""
    user, system = map(int, Path(f"/proc/{pid}/stat").read_text("utf-8").split()[13:15])
    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text("utf-8"))
    seconds = (user + system) / os.sysconf("SC_CLK_TCK")
    return f"{seconds:.1f} s of CPU, peak {int(peak[1]) / 1e3:.1f} MB," if peak else ""


def test_many_names_lose_nothing_to_two_kills(redpipe, fake_reddit, tmp_path):
    names = [f"name{n}" for n in range(30)]
    follow_many(redpipe, fake_reddit, tmp_path / "posts.db", names, 9)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_hundred_names_lose_nothing_in_five_minutes_with_two_kills(
    redpipe, fake_reddit, tmp_path
):
    names = [f"name{n}" for n in range(300)]
    follow_many(redpipe, fake_reddit, tmp_path / "posts.db", names, 300)


def test_a_killed_import_goes_on(redpipe, tmp_path, seed):
    path, file = tmp_path / "posts.db", tmp_path / "posts.ndjson"
    lines = [f'{{"name": "t3_{n}a", "title": "{"x" * 2000}"}}\n' for n in range(20_000)]
    file.write_text("".join(lines), "utf-8")
    process = redpipe.start(f"--from={file}", path)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(random.Random(seed).uniform(0.2, 0.5))
    process.kill()
    process.communicate()
    assert redpipe(f"--from={file}", path) == (0, "", "")
    assert len(stored(path)) == 20_000
