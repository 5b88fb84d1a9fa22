"""Whatever happens to a listing while it is read: its end is seen only where it is.

A `Listing` is a model of Reddit's: of its thousand places some are empty, as the posts there
have been removed; between two requests posts are removed and new ones push others out; an
anchor that is not shown gives an empty page, and so does everything during a silence.
"""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import HORIZON, PAGE, Page, Unanswered, pages_back


class Listing:
    """A listing, newest first, and what happens to it before each request."""

    def __init__(self, dice: random.Random, *, feed: bool) -> None:
        self.dice, self.feed = dice, feed
        self.places: list[str] = []
        self.removed: set[str] = set()
        self.number, self.silent, self.asked = 10**6, 0, 0
        self.thin = dice.choice([0, 0.05, 0.15])
        self.keeps_places = dice.random() < 0.5
        self.lost = dice.choice([0, 0.05, 0.3])
        self.purges = dice.choice([0, 0.05])
        self.arrivals = dice.choice([0, 0, 1, 5, 20, 100, 400])
        self.silences = dice.choice([0, 0, 0.05, 0.3])
        self.arrive(dice.choice([1, 2, 3, 8, 9, 60, 99, 100, 101, 150, 300, 900, 1000, 1300]))

    def arrive(self, count: int) -> None:
        for _ in range(count):
            self.number += 1
            self.places.insert(0, str(self.number))
            if self.dice.random() < self.thin:
                self.removed.add(str(self.number))
        del self.places[1000:]

    def remove(self, posts: list[str]) -> None:
        if self.keeps_places:
            self.removed.update(posts)
        else:
            self.places = [post for post in self.places if post not in posts]

    def happen(self, anchor: str | None) -> None:
        """Let posts come and go, among them the anchor and those above it."""
        self.arrive(self.dice.randint(0, self.arrivals))
        if anchor in self.places:
            index = self.places.index(anchor)
            if self.dice.random() < self.lost:
                self.remove([anchor])
            if self.dice.random() < self.purges:
                self.remove(self.places[max(0, index - 9) : index + 1])
        if self.dice.random() < self.silences:
            self.silent = self.dice.randint(1, 7)

    def ask(self, after: str | None) -> Page:
        anchor = after[3:] if after else None
        self.asked += 1
        self.happen(anchor)
        self.silent = max(0, self.silent - 1)
        if self.silent or anchor not in (None, *self.shown()):
            return Page([])
        start = self.places.index(anchor) + 1 if anchor else 0
        page = [post for post in self.places[start : start + PAGE] if post not in self.removed]
        more = self.feed or start + PAGE < len(self.places)
        posts = [{"id": post, "created_utc": int(post)} for post in page]
        return Page(
            posts, f"t3_{page[-1]}" if more and page else None, len(page), 0.0, not self.feed
        )

    def shown(self) -> list[str]:
        return [post for post in self.places if post not in self.removed]


@pytest.mark.parametrize("feed", [False, True])
@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**64))
def test_what_is_listed_at_the_end_has_been_read(feed, seed):
    listing = Listing(random.Random(seed), feed=feed)
    before = set(listing.shown())
    first = listing.ask(None)
    if not first.things:
        return
    read = set[str]()
    with contextlib.suppress(Unanswered):  # such a walk is dropped
        for page in pages_back(first, listing.ask):
            read.update(post["id"] for post in page.posts)
    if page.after is None:
        assert before.intersection(listing.shown()) <= read
    assert listing.asked <= 12 * HORIZON // PAGE
