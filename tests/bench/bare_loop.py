"""Store posts with nothing around it: the floor that `--from` is measured against.

    python3 bare_loop.py FILE DATABASE

The columns, the index, the pragmas and the batches are redpipe's; nothing is checked.
"""

import json
import sqlite3
import sys
import time
from itertools import islice
from pathlib import Path

BATCH = 500

SCHEMA = """
CREATE TABLE posts (
    id TEXT PRIMARY KEY NOT NULL, created_utc INTEGER, subreddit TEXT, title TEXT,
    author TEXT, author_name TEXT, permalink TEXT, stored_utc INTEGER
);
CREATE INDEX posts_created_utc ON posts (created_utc);
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
"""


def row(line: bytes, now: int) -> tuple:
    post = json.loads(line)
    return (
        post["id"],
        post.get("created_utc"),
        post.get("subreddit"),
        post.get("title"),
        post.get("author_fullname"),
        post.get("author"),
        post.get("permalink"),
        now,
    )


def main(path: str, database: str) -> None:
    connection = sqlite3.connect(database, isolation_level=None)
    connection.executescript(SCHEMA)
    with Path(path).open("rb") as file:
        while lines := list(islice(file, BATCH)):
            now = int(time.time())
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT OR IGNORE INTO posts VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [row(line, now) for line in lines],
            )
            connection.execute("COMMIT")
    connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
