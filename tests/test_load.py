"""The database: its schema, what load stores, and what it never forgets."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from conftest import query
from pipeline import Cursor, Database, Field, Gap, NotOurs, StorageFailed, load, parse_fields
from virtual import VirtualClock

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
def clock():
    return VirtualClock(NOW)


@pytest.fixture
def database(path, clock):
    with Database(path, clock=clock) as opened:
        yield opened


# --- the schema


def columns(path, table):
    """Give name, type, whether NULL is refused, and place in the key, of each column."""
    return [(name, kind, must, key) for _, name, kind, must, _, key in query(path, table)]


def test_a_new_database_has_these_tables(database, path):
    assert columns(path, "PRAGMA table_info(posts)") == [
        ("id", "TEXT", 1, 1),
        ("created_utc", "INTEGER", 0, 0),
        ("subreddit", "TEXT", 0, 0),
        ("title", "TEXT", 0, 0),
        ("author", "TEXT", 0, 0),
        ("author_name", "TEXT", 0, 0),
        ("permalink", "TEXT", 0, 0),
        ("stored_utc", "INTEGER", 0, 0),
        ("checked_utc", "INTEGER", 0, 0),
        ("erased_utc", "INTEGER", 0, 0),
    ]
    assert columns(path, "PRAGMA table_info(cursors)") == [
        ("subreddit", "TEXT", 1, 1),
        ("since_utc", "INTEGER", 0, 0),
        ("newest_utc", "INTEGER", 0, 0),
        ("polled_utc", "INTEGER", 0, 0),
    ]
    assert columns(path, "PRAGMA table_info(gaps)") == [
        ("subreddit", "TEXT", 0, 0),
        ("after_utc", "INTEGER", 0, 0),
        ("before_utc", "INTEGER", 0, 0),
        ("noticed_utc", "INTEGER", 0, 0),
    ]
    assert query(path, "SELECT type, name FROM sqlite_master WHERE sql NOT NULL ORDER BY 1, 2") == [
        ("index", "posts_created_utc"),
        ("table", "cursors"),
        ("table", "gaps"),
        ("table", "posts"),
        ("view", "coverage"),
        ("view", "posts_per_hour"),
        ("view", "recent_posts"),
    ]
    assert [name for _, _, name in query(path, "PRAGMA index_info(posts_created_utc)")] == [
        "created_utc"
    ]


def test_the_file_says_whose_it_is(database, path):
    assert query(path, "PRAGMA application_id") == [(0x72647069,)]
    assert query(path, "PRAGMA user_version") == [(2,)]
    assert query(path, "PRAGMA journal_mode") == [("wal",)]


def test_writing_waits_for_the_disk_as_wal_allows(database):
    assert list(database.execute("PRAGMA synchronous")) == [(1,)]
    [(milliseconds,)] = database.execute("PRAGMA busy_timeout")
    assert milliseconds <= 1000


def test_a_closed_database_is_one_file(path, tmp_path):
    with Database(path) as database:
        load(database, [row("a1")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["posts.db"]


def test_opening_again_changes_nothing(path, tmp_path):
    with Database(path) as database:
        load(database, [row("a1")])
    before = (tmp_path / "posts.db").read_bytes()
    Database(path).__exit__()
    assert (tmp_path / "posts.db").read_bytes() == before


def test_recent_posts_are_newest_first_with_readable_time_and_link(database, path):
    load(
        database,
        [
            row("a1", 1700000000, "python", "Older", "t2_1", "ann", "/r/python/comments/a1/o/"),
            row("a2", 1700003600, "rust", "Newer", None, None, "/r/rust/comments/a2/n/"),
            row("a3"),
        ],
    )
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT * FROM recent_posts")
        assert [column[0] for column in found.description] == [
            "created",
            "subreddit",
            "title",
            "author_name",
            "link",
        ]
        assert found.fetchall() == [
            (
                "2023-11-14T23:13:20Z",
                "rust",
                "Newer",
                None,
                "https://www.reddit.com/r/rust/comments/a2/n/",
            ),
            (
                "2023-11-14T22:13:20Z",
                "python",
                "Older",
                "ann",
                "https://www.reddit.com/r/python/comments/a1/o/",
            ),
            (None, None, None, None, None),
        ]


def test_posts_per_hour_counts_by_the_hour_in_utc(database, path):
    load(database, [row("a1", 1700000000), row("a2", 1700002799), row("a3", 1700002800), row("a4")])
    assert query(path, "SELECT hour, posts FROM posts_per_hour") == [
        ("2023-11-14T23:00:00Z", 1),
        ("2023-11-14T22:00:00Z", 2),
        (None, 1),
    ]


def test_coverage_tells_of_each_name_whether_it_is_complete(database, path):
    cursors = [
        Cursor("python", 1700000000, 1700003600, 1700003610),
        Cursor("rust", 1700000000, 1700000000, 1700003610),
    ]
    load(database, [], cursors)
    load(database, [], [], [Gap("rust", 10, 1700003000, 1), Gap("rust", 20, 1700003600, 2)])
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT * FROM coverage ORDER BY subreddit")
        names = [column[0] for column in found.description]
        assert names == ["subreddit", "since", "until", "last_poll", "gaps"]
        since, until = "2023-11-14T22:13:20Z", "2023-11-14T23:13:20Z"
        assert found.fetchall() == [
            ("python", since, until, "2023-11-14T23:13:30Z", 0),
            ("rust", since, since, "2023-11-14T23:13:30Z", 2),
        ]


# --- rows


def test_rows_are_stored_as_they_are(database, path):
    rows = [
        row("a2", 1700000000, "Python", "One", "t2_1", "ann", "/r/Python/comments/a2/one/"),
        row("a1"),
    ]
    assert load(database, rows) == 2
    assert query(path, "SELECT * FROM posts ORDER BY id") == [
        ("a1", *NONE, NOW, *UNASKED),
        (
            "a2",
            1700000000,
            "Python",
            "One",
            "t2_1",
            "ann",
            "/r/Python/comments/a2/one/",
            NOW,
            *UNASKED,
        ),
    ]


def test_rows_may_come_one_by_one(database, path):
    assert load(database, (row(f"a{n}") for n in range(5))) == 5
    assert query(path, "SELECT count(*) FROM posts") == [(5,)]


def test_a_stored_post_gains_what_was_null_and_loses_nothing(database, path, clock):
    assert load(database, [row("a1", None, "python", None, "t2_1")]) == 1
    clock.advance(60)
    again = row("a1", 1700000000, "rust", "Title", None, "ann", "/x")
    assert load(database, [again]) == 1
    stored = [("a1", 1700000000, "python", "Title", "t2_1", "ann", "/x", NOW, *UNASKED)]
    assert query(path, "SELECT * FROM posts") == stored
    assert load(database, [again]) == 0
    assert load(database, [row("a1")]) == 0
    assert query(path, "SELECT * FROM posts") == stored


def test_what_is_empty_or_zero_is_known(database, path):
    load(database, [row("a1", 0, "", "")])
    assert load(database, [row("a1", 1700000000, "python", "Title")]) == 0
    assert query(path, "SELECT created_utc, subreddit, title FROM posts") == [(0, "", "")]


def test_a_post_may_come_twice_in_one_batch(database, path):
    assert load(database, [row("a1"), row("a1", 5), row("a1", 6)]) == 2
    assert query(path, "SELECT id, created_utc FROM posts") == [("a1", 5)]


def test_ids_differ_by_case_and_have_any_length(database, path):
    ids = ["a", "A", "0", "00", "z" * 100]
    assert load(database, [row(identifier) for identifier in ids]) == 5
    assert {found for (found,) in query(path, "SELECT id FROM posts")} == set(ids)


def test_fields_follow_the_built_in_columns(path, clock):
    fields = [Field(("score",), "score"), Field(("over_18",), "order")]
    with Database(path, fields, clock) as database:
        load(database, [row("a1", score=5, order=None)])
        load(database, [row("a1", score=6, order=1), row("a2", score=None, order=0)])
    assert query(path, "SELECT * FROM posts ORDER BY id") == [
        ("a1", *NONE, NOW, *UNASKED, 5, 1),
        ("a2", *NONE, NOW, *UNASKED, None, 0),
    ]


def test_a_database_of_many_fields_takes_rows_of_few(path):
    with Database(path, parse_fields(["score", "ups"])) as database:
        load(database, [row("a1", score=1, ups=2)])
    with Database(path, parse_fields(["Ups"])) as database:
        load(database, [row("a1", Ups=9), row("a2", Ups=3)])
    assert query(path, "SELECT id, score, ups FROM posts ORDER BY id") == [
        ("a1", 1, 2),
        ("a2", None, 3),
    ]


# --- cursors and gaps


def python(since, newest, polled):
    return [Cursor("python", since, newest, polled)]


def test_a_cursor_is_stored_and_read_back(database):
    assert database.cursor("python") is None
    load(database, [], [*python(100, 200, 300), Cursor("rust", 1, 2, 3)])
    assert database.cursor("python") == ("python", 100, 200, 300)
    assert database.cursor("rust") == ("rust", 1, 2, 3)
    assert database.cursor("go") is None


def test_a_cursor_never_moves_back(database):
    load(database, [], python(100, 200, 300))
    load(database, [], python(100, 190, 310))
    assert database.cursor("python") == ("python", 100, 200, 310)
    load(database, [], python(100, 210, 320))
    assert database.cursor("python") == ("python", 100, 210, 320)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ((100, 200), (150, 300), (150, 300)),
        ((150, 300), (100, 200), (150, 300)),
        ((100, 200), (201, 300), (201, 300)),
        ((201, 300), (100, 200), (201, 300)),
    ],
)
def test_of_two_first_runs_the_one_that_claims_less_says_where_coverage_begins(
    database, first, second, together
):
    for cursor in (first, second):
        load(database, [], python(*cursor, 400))
    assert database.cursor("python") == ("python", *together, 400)


GAP = [Gap("python", 30, 800, 910)]


def test_a_gap_begins_its_lag_before_the_cursor(database, path):
    load(database, [], python(100, 200, 300))
    load(database, [], python(100, 900, 910), GAP)
    assert query(path, "SELECT * FROM gaps") == [("python", 170, 800, 910)]
    assert database.cursor("python") == ("python", 100, 900, 910)


def test_a_gap_is_none_when_another_process_has_moved_the_cursor_past_it(database, path):
    load(database, [], python(100, 200, 300))
    load(database, [], python(100, 850, 860))
    load(database, [], python(100, 900, 910), GAP)
    assert query(path, "SELECT * FROM gaps") == []
    assert database.cursor("python") == ("python", 100, 900, 910)


def test_a_gap_begins_later_when_another_process_has_moved_the_cursor_on(database, path):
    load(database, [], python(100, 200, 300))
    load(database, [], python(100, 400, 410))
    load(database, [], python(100, 900, 910), GAP)
    assert query(path, "SELECT * FROM gaps") == [("python", 370, 800, 910)]
    assert database.cursor("python") == ("python", 100, 900, 910)


def test_a_gap_without_a_cursor_is_not_named(database, path):
    load(database, [], [], GAP)
    assert query(path, "SELECT * FROM gaps") == []


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


# --- what is stored already


def test_unstored_posts_are_those_that_are_new(database):
    load(database, [row("a1", author="t2_1")])
    posts = [{"id": "a3"}, {"id": "a1"}, {"id": "a2"}]
    assert database.unstored(posts) == [{"id": "a3"}, {"id": "a2"}]
    assert database.unstored([]) == []


def test_a_post_stored_without_its_author_counts_as_unstored(database):
    load(database, [row("a1"), row("a2"), row("a3", author="t2_1")])
    posts = [
        {"id": "a1", "author_fullname": "t2_1"},
        {"id": "a2"},
        {"id": "a3", "author_fullname": "t2_2"},
    ]
    assert database.unstored(posts) == posts[:1]


def test_any_number_of_posts_is_looked_up(database):
    load(database, [row(f"a{n}", author="t2_1") for n in range(0, 3000, 2)])
    posts = [{"id": f"a{n}"} for n in range(3000)]
    assert database.unstored(posts) == posts[1::2]


# --- files that are not ours


def make_newer(path):
    Database(path).__exit__()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")


def make_foreign(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE posts (id)")


def make_text(path):
    Path(path).write_text("no database")


@pytest.mark.parametrize("make", [make_newer, make_foreign, make_text])
def test_what_is_not_ours_is_refused_untouched(path, tmp_path, make):
    make(path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(NotOurs):
        Database(path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_file_deleted_under_us_is_noticed(database, path, tmp_path):
    (tmp_path / "posts.db").unlink()
    with pytest.raises(StorageFailed, match="deleted or replaced"):
        load(database, [row("a1")])
    with pytest.raises(StorageFailed, match="deleted or replaced"):
        database.cursor("python")


def test_a_file_replaced_under_us_is_noticed(database, path, tmp_path):
    (tmp_path / "posts.db").rename(tmp_path / "old.db")
    Database(path).__exit__()
    with pytest.raises(StorageFailed, match="deleted or replaced"):
        load(database, [row("a1")])
