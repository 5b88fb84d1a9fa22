"""The process: version, arguments, environment, signals, terminal, exit status."""

import sys

if sys.version_info < (3, 10):  # this file must parse on Python 3.6 to say so
    sys.exit(
        "redpipe needs Python 3.10 or newer; this is %d.%d (%s)"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import os
import signal
import time
from _thread import allocate_lock
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # typing's own costs milliseconds at every start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from io import BufferedReader
    from typing import Any, TextIO

    from pipeline import Access, Batch, Cursor, Database, Fetch, Reddit, RedpipeError, Row, Survey

    Tell = Callable[[], str]

VERSION = "2.0.0"

USAGE = """Keep a SQLite database of Reddit's new posts.

Usage:
  redpipe.pyz [options] [--field=SPEC]... [--] <database> [<subreddit>...]
  redpipe.pyz (-h | --help)
  redpipe.pyz --version

Follows the subreddits (python, r/python or a+b; none means all of Reddit) until
it is stopped, and stores each new post once. Started again, it goes on.

Options:
  --once              Store everything new since the last run, then exit (cron).
  --from=FILE         Read posts from FILE instead of Reddit: a post, a t3 thing or
                      a listing a line; - is standard input.
  --field=SPEC        Also store a field: KEY or KEY:COLUMN; dots reach into objects.
                      May be repeated.
  --interval=SECONDS  Longest wait between two polls, 1 to 3600 (default: 25).
  --print             Also write each new post to standard output, as a line of JSON.
  --status            Show what is stored and how complete it is, then exit.
  -q, --quiet         Say errors only.
  -v, --verbose       Say what every poll did.
  -h, --help          Show this text.
  --version           Show the version.

Credentials come from the environment: see Credentials in README.
"""

CONFLICTS = {  # none of the second goes with the first
    "--from": ("--once", "--status", "--interval", "--print"),
    "--status": ("--once", "--interval", "--print", "--field"),
    "--quiet": ("--verbose",),
}

if not os.path.isdir(sys.path[0]):  # in the archive: the host's packages keep out
    sys.path[:] = [p for p in sys.path if not p.endswith(("site-packages", "dist-packages"))]


class Stopped(BaseException):
    """A signal asks the process to end."""


class Signals:
    """Turns signals into Stopped."""

    def __init__(self) -> None:
        self.number = 0
        self.deaf_until = 0.0
        self.holds = 0

    def listen(self) -> None:
        """Take over the signals that end a process, save those that are ignored."""
        import atexit

        atexit.register(self.die)  # the first to be registered is the last to run
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.arrived)

    def arrived(self, number: int, frame: object) -> None:
        """Stop; once more only a second later, if the first was lost in a finalizer."""
        now = time.monotonic()
        if not self.number or now > self.deaf_until:
            self.number = self.number or number
            self.deaf_until = now + 1
            self.check()

    def check(self) -> None:
        if self.number and not self.holds:
            raise Stopped

    @contextmanager
    def held(self) -> "Iterator[None]":
        """Hold signals back until the end of the context."""
        self.holds += 1
        try:
            yield
        finally:
            self.holds -= 1
        self.check()

    def die(self) -> None:
        """End the process by the signal that came, when all exit handlers have run."""
        if self.number:
            signal.signal(self.number, signal.SIG_DFL)
            os.kill(os.getpid(), self.number)


class Console:
    """Standard error: messages and, on a terminal, a line below them that lives.

    Control characters, which messages may have from outside, are not written. A closed
    standard error is not an error, and a terminal that takes nothing is not waited for.
    """

    def __init__(self, stream: "TextIO | None") -> None:
        self.stream = stream
        self.terminal = self.lives = stream is not None and stream.isatty()
        self.line = ""
        self.lock = allocate_lock()

    def write(self, message: str) -> None:
        """Write a message above the line; what a logging handler calls."""
        printable = "".join(c if c.isprintable() else "\ufffd" for c in message.rstrip("\n"))
        with self.lock:
            blank = " " * self._width() + "\r" if self.line else ""
            self._put(blank + printable + "\n" + self.line, patience=1.0)

    def live(self, tell: "Tell") -> None:
        """Show what `tell` returns, from now on and anew every second, until `close`."""
        import threading

        def draw() -> None:
            if hasattr(signal, "pthread_sigmask"):  # or they might not wake the main thread
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            while self.lives:
                self._draw(tell())
                time.sleep(1)

        if self.lives:
            threading.Thread(target=draw, daemon=True).start()

    def close(self) -> None:
        """Leave the line as it is; nothing is drawn any more."""
        with self.lock:
            if self.line:
                self._put("\n")
            self.lives, self.line = False, ""

    def _draw(self, line: str) -> None:
        with self.lock:
            if self.lives:
                width = self._width()
                if len(line) > width:  # whole parts, as many as fit
                    line = line[:width].rpartition(", ")[0] or line[:width]
                self._put(line.ljust(width) + "\r" + line)
                self.line = line

    def _put(self, text: str, patience: float = 0.0) -> None:
        try:
            if self.stream is not None and self._is_ready(patience):
                self.stream.write("\r" * self.terminal + text)
                self.stream.flush()
        except (OSError, ValueError):
            # What is left in its buffer would fail once more at exit, and make that 120.
            self.stream = sys.stderr = None

    def _is_ready(self, patience: float) -> bool:
        if not self.terminal or sys.platform == "win32":
            return True
        import select

        return bool(select.select([], [2], [], patience)[1])

    def _width(self) -> int:
        with suppress(OSError):
            return (os.get_terminal_size(2).columns or 80) - 1
        return 79


def say(text: str, signals: Signals) -> None:
    """Write to standard output, at once. Raises StorageFailed, or Stopped by SIGPIPE."""
    left = text.encode()
    try:
        while left:  # past Python's buffer, which would be written once more at exit
            left = left[os.write(sys.stdout.fileno(), left) :]
    except BrokenPipeError:
        signals.arrived(signal.SIGPIPE, None)
    except (OSError, AttributeError) as exc:  # it is None when it was closed at the start
        from pipeline import StorageFailed  # here: --help needs no pipeline

        reason = getattr(exc, "strerror", "closed")
        raise StorageFailed(f"standard output: {reason}") from exc


def parse_arguments(argv: "list[str]") -> "dict[str, Any]":
    """Read the command line. Raises BadUsage."""
    from docopt import docopt

    usage = USAGE.replace("<database>", "[<database>]")  # the check of options comes first
    try:
        arguments = dict(docopt(usage, argv, default_help=False))
    except SystemExit as error:
        import re

        from pipeline import BadUsage

        check_options({word.partition("=")[0] for word in argv})
        unmatched = re.findall(r"'([^']*)'", str(error).partition("\n")[0])
        words = "unknown or repeated: " + " ".join(unmatched) if unmatched else "wrong options"
        raise BadUsage(f"{words}; see redpipe.pyz --help") from None
    check_options({option for option, value in arguments.items() if value not in (None, False, [])})
    return arguments


def check_options(given: "set[str]") -> None:
    """Raise BadUsage for options that do not go together."""
    from pipeline import BadUsage

    for one, others in CONFLICTS.items():
        for other in given.intersection(others if one in given else ()):
            raise BadUsage(f"{one} and {other} do not go together")


def parse_subreddits(arguments: "list[str]") -> "list[str]":
    """Read python, r/python, /r/python/ and a+b as lower-case names, each once."""
    import re

    from pipeline import BadUsage

    names = []
    for argument in arguments:
        if argument.lower().endswith((".db", ".sqlite", ".sqlite3")):
            raise BadUsage(f"{argument}: the database comes first, then the subreddits")
        for name in re.sub(r"^/?r/|/$", "", argument).split("+"):
            if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise BadUsage(f"{argument}: not a subreddit name, like python, r/python or a+b")
            names.append(name.lower())
    return list(dict.fromkeys(names))


def parse_interval(text: "str | None") -> float:
    """Read --interval, in seconds."""
    from pipeline import BadUsage

    with suppress(ValueError):
        seconds = 25.0 if text is None else float(text)
        if 1 <= seconds <= 3600:
            return seconds
    raise BadUsage(f"--interval={text}: not a number of seconds from 1 to 3600")


def read_access(environ: "Mapping[str, str]") -> "Access":
    """Read where to ask, and with which credentials. Raises BadEnvironment."""
    import re
    from urllib.parse import urlsplit

    from pipeline import WWW_URL, Access, BadEnvironment, is_loopback

    def variable(name: str) -> str:
        return environ.get(name, "").strip()

    user = variable("REDDIT_USERNAME")
    access = Access(
        url=read_url(variable("REDPIPE_URL")),
        client_id=variable("REDDIT_CLIENT_ID"),
        client_secret=variable("REDDIT_CLIENT_SECRET"),
        username=user,
        feed_token=variable("REDDIT_FEED_TOKEN"),
        user_agent=f"{sys.platform}:redpipe:{VERSION}" + (f" (by /u/{user})" if user else ""),
    )
    if not re.fullmatch(r"[A-Za-z0-9_-]*", user):
        raise BadEnvironment("REDDIT_USERNAME: not the name of an account")
    if access.client_secret and not access.client_id:
        raise BadEnvironment("REDDIT_CLIENT_SECRET is set, but REDDIT_CLIENT_ID is not")
    if access.feed_token and not user:
        raise BadEnvironment("REDDIT_FEED_TOKEN is set, but REDDIT_USERNAME is not")
    secret = access.client_id or access.feed_token
    if secret and urlsplit(access.url).scheme == "http" and not is_loopback(access.url):
        raise BadEnvironment("REDPIPE_URL: credentials go to another machine by https only")
    check_proxies(environ, access.url or WWW_URL)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if environ.get(name) and not holds_certificate(environ[name]):
            raise BadEnvironment(f"{name}: not a file or folder that holds a certificate")
    return access


def read_url(url: str) -> str:
    """Check REDPIPE_URL; it is not repeated in messages, it may hold a password."""
    from pipeline import BadEnvironment

    if url and ("@" in url or not is_address(url)):
        raise BadEnvironment("REDPIPE_URL: not of the form http(s)://host[:port][/path]")
    return url.rstrip("/")


def is_address(url: str) -> bool:
    """Return whether it is of the form http(s)://[user:password@]host[:port][/path]."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(good) and url.isprintable() and not set(" ?#") & set(url)


def check_proxies(environ: "Mapping[str, str]", url: str) -> None:
    """Raise BadEnvironment for a proxy that can never work, unless NO_PROXY has it unused."""
    from urllib.parse import urlsplit
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    from pipeline import BadEnvironment

    target = urlsplit(url)
    # Of names in lower and upper case the lower counts.
    names = {name.lower(): name for name in sorted(environ) if environ[name]}
    if proxy_bypass_environment(
        target.hostname, {"no": environ.get(names.get("no_proxy", ""), "")}
    ):
        return
    kinds = ["https_proxy", "http_proxy"]
    if target.scheme + "_proxy" not in names:
        kinds.append("all_proxy")
    for name in [names[kind] for kind in kinds if kind in names]:
        proxy = environ[name]
        if not is_address(proxy if "://" in proxy else "http://" + proxy):
            raise BadEnvironment(
                f"{name}: not of the form http(s)://host:port; SOCKS is not spoken"
            )


def holds_certificate(path: str) -> bool:
    """Return whether a file, or a file of a folder that is named by its hash, does."""
    import re
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    names = os.listdir(path) if os.path.isdir(path) else []
    files = [os.path.join(path, n) for n in names if re.fullmatch(r"[0-9a-f]{8}\.[0-9]+", n)]
    for file in files or [path]:
        try:
            context.load_verify_locations(file)
        except OSError:
            continue
    return context.cert_store_stats()["x509"] > 0


def open_network() -> "Fetch":
    """Import requests, whose certificates go from the archive to a temporary file."""
    import tempfile

    import pipeline

    try:
        fetch = pipeline.http_fetch()
        import certifi

        with open(certifi.where(), "rb") as file:
            whole = b"END CERTIFICATE" in file.read()[-40:]
    except OSError as exc:
        raise pipeline.StorageFailed(
            f"temporary directory {tempfile.tempdir or ''}: {exc.strerror or exc}; set TMPDIR"
        ) from exc
    if not whole:
        raise pipeline.StorageFailed(f"temporary directory {tempfile.tempdir}: full; set TMPDIR")
    return fetch


def log_to(console: Console, arguments: "dict[str, Any]") -> None:
    """Send the log to the console, as much of it as the options say."""
    import logging

    level = logging.INFO if console.terminal else logging.WARNING
    level = logging.DEBUG if arguments["--verbose"] else level
    handler = logging.StreamHandler(console)
    handler.setFormatter(logging.Formatter("redpipe: %(message)s"))
    logger = logging.getLogger("redpipe")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.ERROR if arguments["--quiet"] else level)
    logger.propagate = False


def share_done(file: "BufferedReader", seconds: float) -> str:
    """Say how much of FILE was read in so many seconds, and when a regular one will be done.

    It looks at two numbers only, so a thread may call it at any time, even on a closed file.
    """
    size, taken = file.raw.size, file.raw.taken  # type: ignore[attr-defined]  # a CountingFile
    speed = taken / max(seconds, 0.1)
    if not 0 < taken <= size:  # a pipe, or a file that grows
        return f"{taken / 1e6:,.0f} MB read, {speed / 1e6:,.0f} MB/s"
    left = int((size - taken) / speed)
    return (
        f"{100 * taken // size} % of {size / 1e6:,.0f} MB read, {speed / 1e6:,.0f} MB/s, "
        f"{left // 60}:{left % 60:02} left"
    )


def source_of(access: "Access") -> str:
    from urllib.parse import urlsplit

    credentials = "a feed token" if access.feed_token else "no credentials"
    credentials = "an app" if access.client_id else credentials
    return f"from {urlsplit(access.url).hostname or 'Reddit'} with {credentials}"


def standing(reddit: "Reddit") -> str:
    """Say what is going on, for how long, and what is left of the budget."""
    what, until = reddit.doing
    if until is not None:  # what comes next, or what lasts
        left = duration(until - reddit.clock.monotonic() + 0.999)
        what += (" in " if "next" in what else ": ") + left
    return f"{what}, {reddit.at_once():,} requests left"


def duration(seconds: float) -> str:
    """Say how long something takes, in the largest unit of which there are two."""
    units = ((86400, "d"), (3600, "h"), (60, "min"))
    size, unit = next((unit for unit in units if seconds >= 2 * unit[0]), (1, "s"))
    return f"{max(0, int(seconds)) // size:,} {unit}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


class Progress:
    """What came to be stored, how fast, and how old the newest post is.

    The rate is that of posting, by the times of the last five minutes' posts: how fast
    they are caught up with tells nothing. Of a file it is that of reading.
    """

    def __init__(self, standing: "Tell") -> None:
        self.standing = standing
        self.stored = self.gaps = self.newest = 0
        self.since: float = time.time()
        self.recent: list[int] = []

    def add(self, stored: int, rows: "Sequence[Row]", batch: "Batch") -> None:
        self.stored += stored
        self.gaps += len(batch.gaps)
        for cursor in batch.cursors:
            self.newest = max(self.newest, cursor.newest_utc)
            times = [row["created_utc"] for row in rows if row["created_utc"]]
            self.since = min([self.since, *times])
            self.recent = [at for at in self.recent + times if at > time.time() - 300]

    def line(self) -> str:
        now, count, newest = time.time(), self.stored, ""
        seconds = now - self.since
        if self.newest:
            count, seconds = sum(at > now - 300 for at in self.recent), min(300.0, seconds)
            newest = f"newest {duration(now - self.newest)} ago, "
        rate = count / max(1.0, seconds)
        speed = f"{rate:,.1f}/s" if rate >= 0.1 or not rate else f"{3600 * rate:,.0f}/h"
        return f"redpipe: {self.stored:,} posts stored, {speed}, {newest}{self.standing()}"


HEADINGS = ("name", "since", "until", "poll", "posts", "gaps", "span", "last 14 days")


def status_table(survey: "Survey", cursors: "Sequence[Cursor]", now: int) -> "list[str]":
    """Lay out a line for each cursor, at most 100 columns wide."""
    rows = [HEADINGS]
    for name, since, newest, polled in cursors:
        gaps = [(after, before) for owner, after, before in survey.gaps if owner == name]
        posts = survey.posts[name]
        days = [days_of(after, before) for after, before in gaps]
        poll = duration(now - polled) if polled else "never"
        span = duration(sum(before - after for after, before in gaps)) if gaps else ""
        drawn = bar(posts, days_of(since, max(newest, polled)), days, now // 86400)
        counts = f"{sum(posts.values()):,}", f"{len(gaps):,}"
        rows.append((name, utc(since)[:10], utc(newest), poll, *counts, span, drawn))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], 100 - sum(widths[1:]) - 2 * len(widths[1:]))
    cells = [zip(row, "<<<>>>><", widths, strict=True) for row in rows]
    return [
        "  ".join(f"{text:{side}{width}.{width}}" for text, side, width in row).rstrip()
        for row in cells
    ]


def utc(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) if seconds else "-"


def days_of(first: int, last: int) -> range:
    return range(first // 86400, last // 86400 + 1)


def bar(posts: "Mapping[int, int]", covered: range, gaps: "Sequence[range]", today: int) -> str:
    """Draw the posts of the last 14 days, today's last, by the day that had most."""
    drawn = ""
    most = max(1, *(posts.get(day, 0) for day in range(today - 13, today + 1)))
    for day in range(today - 13, today + 1):
        level = "▁▂▃▄▅▆▇█"[-(-7 * posts.get(day, 0) // most)] if day in covered else "·"
        drawn += "!" if any(day in gap for gap in gaps) else level
    return drawn


class Run:
    """One run: what was asked for, and the process it runs in."""

    def __init__(self, arguments: "dict[str, Any]", signals: Signals, console: Console) -> None:
        import pipeline

        self.arguments = arguments
        self.signals = signals
        self.console = console
        self.path: str = arguments["<database>"]
        if self.path is None:
            raise pipeline.BadUsage("missing <database>; see redpipe.pyz --help")
        self.names = parse_subreddits([name for name in arguments["<subreddit>"] if name != "--"])
        self.fields = pipeline.parse_fields(arguments["--field"])
        self.interval = parse_interval(arguments["--interval"])

    def follow(self, environ: "Mapping[str, str]") -> None:
        """Store what is new on Reddit."""
        import pipeline

        access, names, once = read_access(environ), self.names or ["all"], self.arguments["--once"]
        with self.signals.held():  # an import that was broken off would leave its file behind
            reddit = pipeline.Reddit(access, open_network())
        with self.open_database() as database:
            batches = pipeline.stream(reddit, names, database, interval=self.interval, once=once)
            verb = "polling" if once else "following"
            what = f"{verb} {pipeline.several(names)} {source_of(access)}"
            self.store(database, batches, what, lambda: standing(reddit))

    def open_database(self) -> "Database":
        import pipeline

        return pipeline.Database(self.path, self.fields, shield=self.signals.held)

    def import_file(self) -> None:
        """Store the posts of a file."""
        import pipeline

        path, started = self.arguments["--from"], time.monotonic()
        with pipeline.open_file(path) as file, self.open_database() as database:
            batches = pipeline.read_file(file, self.names)
            what = f"reading {path}"
            self.store(
                database, batches, what, lambda: share_done(file, time.monotonic() - started)
            )

    def store(
        self, database: "Database", batches: "Iterable[Batch]", what: str, standing: "Tell"
    ) -> None:
        """Run the pipeline: posts, rows, transactions; and say how it goes."""
        import gc
        import json

        import pipeline

        gc.enable()
        pipeline.log.info("%s into %s; Ctrl-C stops it", what, self.path)
        progress = Progress(standing)
        if not (self.arguments["--quiet"] or self.arguments["--print"]):
            self.console.live(progress.line)
        try:
            for batch in batches:
                rows = [pipeline.transform(post, self.fields) for post in batch.posts]
                if self.arguments["--print"]:
                    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                    say("".join(lines), self.signals)
                stored = pipeline.load(database, rows, batch.cursors, batch.gaps)
                progress.add(stored, rows, batch)
        finally:
            self.console.close()
            gaps = counted(progress.gaps, "gap")
            pipeline.log.info("%s posts stored, %s", f"{progress.stored:,}", gaps)

    def show_status(self) -> None:
        """Print what is stored of each name. Raises Failed if one was not polled lately."""
        import pipeline

        now = int(time.time())
        survey = pipeline.survey(self.path, now // 86400 - 13)
        known = {cursor.subreddit: cursor for cursor in survey.cursors}
        names = sorted(known) if not self.names or "all" in self.names else self.names
        cursors = [known.get(name) or pipeline.Cursor(name, 0, 0, 0) for name in names]
        count, gaps = sum(survey.posts["all"].values()), len(survey.gaps)
        total = f"{count:,} posts, {counted(gaps, 'gap')}, {survey.size / 1e6:,.1f} MB in all"
        say("\n".join([*status_table(survey, cursors, now), total, ""]), self.signals)
        stale = [cursor.subreddit for cursor in cursors if cursor.polled_utc < now - 3600]
        if stale:
            raise pipeline.Failed(f"{pipeline.several(stale)}: not polled within the last hour")


def run(
    argv: "list[str]", environ: "Mapping[str, str]", signals: Signals, console: Console
) -> None:
    """Do what the command line asks for."""
    if {"-h", "--help", "--version"} & set(argv):
        say(f"redpipe {VERSION}\n" if "--version" in argv else USAGE, signals)
        return
    arguments = parse_arguments(argv)
    run = Run(arguments, signals, console)
    log_to(console, arguments)
    if arguments["--status"]:
        run.show_status()
    elif arguments["--from"] is not None:
        run.import_file()
    else:
        run.follow(environ)


def redpipe_error() -> "type[RedpipeError]":
    """Import late what is caught: --help needs no pipeline."""
    from pipeline import RedpipeError

    return RedpipeError


def main(argv: "list[str]") -> int:
    """Run the program and return its exit status; a signal ends the process later on."""
    import gc

    gc.disable()  # imports create no garbage; not looking for it saves 5 % of startup
    signals = Signals()
    console = Console(sys.stderr)
    try:
        signals.listen()
        try:
            run(argv, os.environ, signals, console)
        except redpipe_error() as error:
            signals.check()
            console.write(f"redpipe: {error}")
            return error.exit_status
        return 0
    except Stopped:
        return 0
    finally:
        signals.holds += 1  # exit handlers are not to be disturbed
        console.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
