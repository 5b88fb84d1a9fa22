"""Asking again: what was deleted on Reddit is erased here, and what grew is refreshed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from conftest import Done
from fake_reddit import make_post

APP = {"REDDIT_CLIENT_ID": "app-id", "REDDIT_CLIENT_SECRET": "app-secret"}


@pytest.fixture
def database(tmp_path) -> Path:
    return tmp_path / "posts.db"


def rows(database, what="*", order="rowid"):
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(f"SELECT {what} FROM posts ORDER BY {order}").fetchall()


def test_what_was_deleted_is_erased_and_the_rest_refreshed(redpipe, fake_reddit, database):
    posts = [fake_reddit.add(make_post(n, score=1)) for n in range(4)]
    assert redpipe("--once", "--field=score", database, "python", **APP) == (0, "", "")
    fake_reddit.take_down(posts[0]["id"], "deleted")
    fake_reddit.take_down(posts[1]["id"], "moderator")
    fake_reddit.forget_author(posts[2]["id"])
    posts[3]["score"] = 99
    asked = len(fake_reddit.requests("/api/info"))
    assert redpipe("--recheck=0", "--field=score", database, **APP) == (0, "", "")
    assert len(fake_reddit.requests("/api/info")) == asked + 1
    assert rows(
        database, "title, author, author_name, permalink IS NULL, score, erased_utc > 0"
    ) == [
        (None, None, None, 1, None, 1),
        ("Invented post number 1", posts[1]["author_fullname"], "invented_1", 0, 1, None),
        ("Invented post number 2", None, None, 0, 1, None),
        ("Invented post number 3", posts[3]["author_fullname"], "invented_3", 0, 99, None),
    ]
    assert b"Invented post number 0" not in database.read_bytes()


def test_it_needs_an_app(redpipe, database):
    done = redpipe("--recheck=1", database)
    assert done == Done(78, "", "redpipe: --recheck needs an app; see README, Credentials\n")
