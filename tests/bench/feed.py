"""How fast a feed is read, measured against what ElementTree takes for the whole of it.

    ./tests/run --bench

100 entries with texts of 4 kB, as Reddit escapes them; one feed is clean, one has a character
in each entry that XML forbids. The two are timed in turn, and the least of each is taken.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from timeit import timeit
from xml.etree import ElementTree

sys.path[:0] = [str(Path(__file__).resolve().parents[at]) for at in (1, 2)]

BAR = 3.0
ROUNDS = 30
TEXT = (
    ' <p>Nobody wrote &amp; sent it&#39;s "text" <a href="https://reddit.invalid/">link</a></p>\n'
)


def main():
    from fake_reddit import atom_feed, make_post
    from pipeline import read_feed

    posts = [make_post(n, 1_790_000_000 - n, selftext_html=(TEXT * 50)[:4000]) for n in range(100)]
    clean = atom_feed(posts, "python", 1_790_000_000)
    bad = clean.replace(b"<title>", b"<title>\x1b & &nbsp; \xff ")
    pairs = {"clean": clean, "a bad title in each entry": bad}
    assert all(len(read_feed(feed, 0.0).posts) == 100 for feed in pairs.values())
    worst = 0.0
    for name, feed in pairs.items():
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(timeit(partial(read_feed, feed, 0.0), number=1))
            theirs.append(timeit(partial(ElementTree.fromstring, clean), number=1))
        ratio = min(ours) / min(theirs)
        worst = max(worst, ratio)
        print(
            f"a feed of 100 entries, {len(feed) / 1e6:.2f} MB, {name}: {min(ours) * 1e3:.1f} ms,"
            f" median {statistics.median(ours) * 1e3:.1f};"
            f" {ratio:.2f} x ElementTree's {min(theirs) * 1e3:.1f} ms (bar {BAR})"
        )
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
