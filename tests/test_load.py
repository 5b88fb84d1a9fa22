"""The database: its schema, what load stores, and what it never forgets."""

from __future__ import annotations

import pytest

from conftest import query
from pipeline import Cursor, Database, Gap, StorageFailed, load

NOW = 1_790_000_000
NONE = (None,) * 6
UNASKED = (None, None)
"""What a post has in checked_utc and erased_utc."""


def row(identifier, *values, **fields):
    """Write a row; values that are not given are None."""
    keys = ("created_utc", "subreddit", "title", "author", "author_name", "permalink")
    padded = (*values, *NONE)[: len(keys)]
    return {"id": identifier, **dict(zip(keys, padded, strict=True)), **fields}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "posts.db")


@pytest.fixture
def database(path, clock):
    with Database(path, clock=clock) as opened:
        yield opened


# --- the schema


def columns(path, table):
    """Describe the columns of a table."""
    columns = query(path, f"SELECT name, type, \"notnull\", pk FROM pragma_table_info('{table}')")
    flags = ["", " KEY", " NOT NULL", " NOT NULL KEY"]
    return ", ".join(f"{name} {kind}{flags[2 * must + key]}" for name, kind, must, key in columns)


def test_a_new_database_has_these_tables_and_views(database, path):
    assert columns(path, "posts") == (
        "id TEXT NOT NULL KEY, created_utc INTEGER, subreddit TEXT, title TEXT, author TEXT,"
        " author_name TEXT, permalink TEXT, stored_utc INTEGER, checked_utc INTEGER,"
        " erased_utc INTEGER"
    )
    assert columns(path, "cursors") == (
        "subreddit TEXT NOT NULL KEY, since_utc INTEGER, newest_utc INTEGER, polled_utc INTEGER"
    )
    assert columns(path, "gaps") == (
        "subreddit TEXT, after_utc INTEGER, before_utc INTEGER, noticed_utc INTEGER"
    )
    assert query(path, "SELECT type, name FROM sqlite_master WHERE sql NOT NULL ORDER BY 1, 2") == [
        ("index", "posts_created_utc"),
        *[("table", name) for name in ("cursors", "gaps", "posts")],
        *[("view", name) for name in ("coverage", "posts_per_hour", "recent_posts")],
    ]
    assert query(path, "SELECT name FROM pragma_index_info('posts_created_utc')") == [
        ("created_utc",)
    ]


def test_the_file_says_whose_it_is_and_is_written_as_wal_allows(database, path):
    assert query(path, "PRAGMA application_id") == [(0x72647069,)]
    assert query(path, "PRAGMA user_version") == [(2,)]
    assert query(path, "PRAGMA journal_mode") == [("wal",)]
    assert database.execute("PRAGMA synchronous") == [(1,)]
    [(milliseconds,)] = database.execute("PRAGMA busy_timeout")
    assert milliseconds <= 1000


def test_a_closed_database_is_one_file_which_opening_again_does_not_change(path, tmp_path):
    with Database(path) as database:
        load(database, [row("a1")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["posts.db"]
    before = (tmp_path / "posts.db").read_bytes()
    Database(path).__exit__()
    assert (tmp_path / "posts.db").read_bytes() == before


def view(path, name):
    """Give the names of a view's columns, and its rows."""
    names = [name for (name,) in query(path, f"SELECT name FROM pragma_table_info('{name}')")]
    return " ".join(names), query(path, f"SELECT * FROM {name}")


def test_recent_posts_are_newest_first_with_readable_time_and_link(database, path):
    older = row("a1", 1700000000, "python", "Older", "t2_1", "ann", "/r/python/comments/a1/o/")
    newer = row("a2", 1700003600, "rust", "Newer", None, None, "/r/rust/comments/a2/n/")
    load(database, [older, newer, row("a3")])
    link = "https://www.reddit.com/r"
    assert view(path, "recent_posts") == (
        "created subreddit title author_name link",
        [
            ("2023-11-14T23:13:20Z", "rust", "Newer", None, f"{link}/rust/comments/a2/n/"),
            ("2023-11-14T22:13:20Z", "python", "Older", "ann", f"{link}/python/comments/a1/o/"),
            (None, None, None, None, None),
        ],
    )


def test_posts_per_hour_counts_by_the_hour_in_utc(database, path):
    load(database, [row("a1", 1700000000), row("a2", 1700002799), row("a3", 1700002800), row("a4")])
    assert view(path, "posts_per_hour") == (
        "hour posts",
        [("2023-11-14T23:00:00Z", 1), ("2023-11-14T22:00:00Z", 2), (None, 1)],
    )


def test_coverage_tells_of_each_name_whether_it_is_complete(database, path):
    cursors = [
        Cursor("python", 1700000000, 1700003600, 1700003610),
        Cursor("rust", 1700000000, 1700000000, 1700003610),
    ]
    load(database, [], cursors)
    load(database, [], [], [Gap("rust", 10, 1700003000, 1), Gap("rust", 20, 1700003600, 2)])
    since, until, polled = "2023-11-14T22:13:20Z", "2023-11-14T23:13:20Z", "2023-11-14T23:13:30Z"
    names, rows = view(path, "coverage")
    assert names == "subreddit since until last_poll gaps"
    assert sorted(rows) == [("python", since, until, polled, 0), ("rust", since, since, polled, 2)]


# --- rows


def test_a_stored_post_gains_what_was_null_and_loses_nothing(database, path, clock):
    assert load(database, [row("a1", None, "python", None, "t2_1"), row("a0")]) == 2
    clock.advance(60)
    again = row("a1", 1700000000, "rust", "Title", None, "ann", "/x")
    assert load(database, [again]) == 1
    stored = [
        ("a0", *NONE, NOW, *UNASKED),
        ("a1", 1700000000, "python", "Title", "t2_1", "ann", "/x", NOW, *UNASKED),
    ]
    assert query(path, "SELECT * FROM posts ORDER BY id") == stored
    assert load(database, [again]) == 0
    assert load(database, [row("a1")]) == 0
    assert query(path, "SELECT * FROM posts ORDER BY id") == stored


def test_what_is_empty_or_zero_is_known(database, path):
    load(database, [row("a1", 0, "", "")])
    assert load(database, [row("a1", 1700000000, "python", "Title")]) == 0
    assert query(path, "SELECT created_utc, subreddit, title FROM posts") == [(0, "", "")]


def test_a_post_may_come_twice_in_one_batch(database, path):
    assert load(database, [row("a1"), row("a1", 5), row("a1", 6)]) == 2
    assert query(path, "SELECT id, created_utc FROM posts") == [("a1", 5)]


# --- cursors and gaps


def python(since, newest, polled):
    return [Cursor("python", since, newest, polled)]


def test_a_cursor_is_read_back_and_never_moves_back(database):
    assert database.cursor("python") is None
    load(database, [], [*python(100, 200, 300), Cursor("rust", 1, 2, 3)])
    assert database.cursor("python") == ("python", 100, 200, 300)
    assert database.cursor("rust") == ("rust", 1, 2, 3)
    load(database, [], python(100, 190, 310))
    assert database.cursor("python") == ("python", 100, 200, 310)
    load(database, [], python(100, 210, 320))
    assert database.cursor("python") == ("python", 100, 210, 320)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ((100, 200), (150, 300), (150, 300)),
        ((150, 300), (100, 200), (150, 300)),
    ],
)
def test_of_two_first_runs_the_one_that_claims_less_says_where_coverage_begins(
    database, first, second, together
):
    for cursor in (first, second):
        load(database, [], python(*cursor, 400))
    assert database.cursor("python") == ("python", *together, 400)


GAP = [Gap("python", 30, 800, 910)]


@pytest.mark.parametrize(
    ("newest", "gaps"),
    [
        pytest.param([], [], id="without a cursor there is none"),
        pytest.param([200], [("python", 170, 800, 910)], id="its lag before the cursor"),
        pytest.param([200, 400], [("python", 370, 800, 910)], id="another process moved it on"),
        pytest.param([200, 850], [], id="another process moved it past the gap"),
    ],
)
def test_a_gap_begins_where_the_cursor_says(database, path, newest, gaps):
    for newest_utc in newest:
        load(database, [], python(100, newest_utc, newest_utc + 10))
    load(database, [], python(100, 900, 910), GAP)
    assert query(path, "SELECT * FROM gaps") == gaps
    assert database.cursor("python") == ("python", 100, 900, 910)


def test_a_batch_is_stored_whole_or_not_at_all(database, path):
    load(database, [], python(100, 200, 300))
    cursors = python(100, 900, 910)
    with pytest.raises(StorageFailed):
        load(database, [row("a1"), row("a2", title=b"\0"), row(None)], cursors, GAP)
    assert query(path, "SELECT count(*) FROM posts") == [(0,)]
    assert query(path, "SELECT count(*) FROM gaps") == [(0,)]
    assert database.cursor("python") == ("python", 100, 200, 300)
    assert load(database, [row("a1")], cursors, GAP) == 1
    assert query(path, "SELECT count(*) FROM gaps") == [(1,)]


def test_unstored_posts_are_those_that_are_new_or_stored_without_their_author(database):
    load(database, [row("a1", author="t2_1"), row("a2"), row("a3"), row("a4", author="t2_1")])
    new = {"id": "a0"}
    named = {"id": "a2", "author_fullname": "t2_1"}
    posts = [new, {"id": "a1"}, named, {"id": "a3"}, {"id": "a4", "author_fullname": "t2_2"}]
    assert database.unstored(posts) == [new, named]
    assert database.unstored([]) == []
