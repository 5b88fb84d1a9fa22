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

TYPE_CHECKING = False  # typing's own costs milliseconds at every start
if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator, Mapping
    from io import BufferedReader
    from typing import Any, TextIO

    from pipeline import Access, Batch, Database, Fetch, Reddit

    # What gives the batches, and what says how far it is.
    Source = tuple[Callable[[Database], Iterator[Batch]], Callable[[Batch], str]]

VERSION = "1.0.0"

USAGE = """Keep a SQLite database of Reddit's new posts.

Usage:
  redpipe.pyz [options] [--field=SPEC]... <database> [<subreddit>...]
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
  -q, --quiet         Say errors only.
  -v, --verbose       Say what every poll did.
  -h, --help          Show this text.
  --version           Show the version.

Environment:
  REDDIT_CLIENT_ID, REDDIT_CLIENT_SECRET   an app's; no secret for an installed app
  REDDIT_USERNAME                          for the User-Agent, and the feed token
  REDDIT_FEED_TOKEN                        lifts the limits of the feed
  REDPIPE_URL                              another address in the place of Reddit's
"""

if not os.path.isdir(sys.path[0]):  # in the archive: the host's packages keep out
    sys.path[:] = [
        entry
        for entry in sys.path
        if os.path.basename(entry) not in ("site-packages", "dist-packages")
    ]


class Stopped(BaseException):
    """A signal asks the process to end."""


class Signals:
    """Turns signals into Stopped; as a context, holds them back until its end."""

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

    def __enter__(self) -> None:
        self.holds += 1

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        self.holds -= 1
        if kind is None:
            self.check()

    def die(self) -> None:
        """End the process by the signal that came, when all exit handlers have run."""
        if self.number:
            signal.signal(self.number, signal.SIG_DFL)
            os.kill(os.getpid(), self.number)


class Console:
    """Standard error: messages and, on a terminal, a progress line below them.

    Control characters, which messages may have from outside, are not written. That
    nobody reads is no reason to stop.
    """

    def __init__(self, stream: "TextIO | None") -> None:
        self.stream = stream
        self.terminal = stream is not None and stream.isatty()
        self.line = ""

    def write(self, message: str) -> None:
        """Write a message above the progress line; what a logging handler calls."""
        printable = "".join(c if c.isprintable() else "\ufffd" for c in message.rstrip("\n"))
        self._put(printable.ljust(len(self.line)) + "\n" + self.line)

    def progress(self, line: str) -> None:
        if self.terminal:
            line = line[: self._width() - 1]
            self._put(line.ljust(len(self.line)))
            self.line = line

    def close(self) -> None:
        if self.line:
            self.line = ""
            self._put("\n")

    def flush(self) -> None:
        """Do nothing: every write is flushed."""

    def _put(self, text: str) -> None:
        try:
            if self.stream is not None:
                self.stream.write("\r" * self.terminal + text)
                self.stream.flush()
        except (OSError, ValueError):
            # What is left in its buffer would fail once more at exit, and make that 120.
            self.stream = sys.stderr = None

    def _width(self) -> int:
        try:
            return os.get_terminal_size(2).columns or 80
        except OSError:
            return 80


def parse_arguments(argv: "list[str]") -> "dict[str, Any]":
    """Read the command line; prints help or the version and exits, or raises DocoptExit."""
    from docopt import docopt

    pipe = getattr(signal, "SIGPIPE", None)
    if pipe:  # --help | head -1 ends in silence, but a lost reader stops no pipeline
        signal.signal(pipe, signal.SIG_DFL)
    arguments = docopt(USAGE, argv, version="redpipe " + VERSION)
    if pipe:
        signal.signal(pipe, signal.SIG_IGN)
    return dict(arguments)


def usage_message(error: SystemExit) -> str:
    """Make one line of what docopt says."""
    import re

    first = str(error).partition("\n")[0]
    unmatched = re.findall(r"'([^']*)'", first) if first.startswith("Warning") else []
    if unmatched:
        first = "unknown or repeated: " + " ".join(unmatched)
    elif first.startswith("Usage") or not first:
        first = "a database is wanted"
    return first + "; see redpipe.pyz --help"


def parse_subreddits(arguments: "list[str]") -> "list[str]":
    """Read python, r/python, /r/python/ and a+b as lower-case names, each once."""
    import re

    from pipeline import BadUsage

    names = []
    for argument in arguments:
        for name in re.sub(r"^/?r/|/$", "", argument).split("+"):
            if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise BadUsage(f"{argument}: no subreddit's name; like python, r/python or a+b")
            names.append(name.lower())
    return list(dict.fromkeys(names))


def parse_interval(text: "str | None") -> float:
    """Read --interval, in seconds."""
    from pipeline import BadUsage

    try:
        seconds = 25.0 if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise BadUsage(f"--interval={text}: not a number of seconds from 1 to 3600")
    return seconds


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


def log_to(console: Console, arguments: "dict[str, Any]") -> "logging.Logger":
    """Send the log to the console, as much of it as the options say."""
    import logging

    level = logging.INFO if console.terminal else logging.WARNING
    if arguments["--quiet"]:
        level = logging.ERROR
        console.terminal = False
    if arguments["--verbose"]:
        level = logging.DEBUG
    handler = logging.StreamHandler(console)
    handler.setFormatter(logging.Formatter("redpipe: %(message)s"))
    logger = logging.getLogger("redpipe")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    return logger


def check_options(arguments: "dict[str, Any]") -> None:
    """Raise BadUsage for options that do not go together."""
    from pipeline import BadUsage

    for one, other in (("--from", "--once"), ("--from", "--interval"), ("--quiet", "--verbose")):
        if not {arguments[one], arguments[other]} & {None, False}:
            raise BadUsage(f"{one} and {other} do not go together")


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


def freshness(reddit: "Reddit", batch: "Batch") -> str:
    """Say how far behind the newest post is, and what is left of the budget."""
    newest = max((cursor.newest_utc for cursor in batch.cursors), default=0)
    behind = max(0, int(reddit.clock.time()) - newest)
    return f"newest {behind:,} s ago, {reddit.at_once()} requests left"


def from_file(file: "BufferedReader", names: "list[str]") -> "Source":
    """Return what reads an open FILE, and what says how far."""
    import pipeline

    started = time.monotonic()
    return (
        lambda database: pipeline.read_file(file, names),
        lambda batch: share_done(file, time.monotonic() - started),
    )


def from_reddit(
    access: "Access", names: "list[str]", interval: float, *, once: bool, signals: Signals
) -> "Source":
    """Get ready for the network, and give what follows Reddit and what says how well."""
    import pipeline

    with signals:  # an import that was broken off would leave its file behind
        reddit = pipeline.Reddit(access, open_network())

    def batches(database: "Database") -> "Iterator[Batch]":
        return pipeline.stream(reddit, names or ["all"], database, interval=interval, once=once)

    return batches, lambda batch: freshness(reddit, batch)


def run(
    arguments: "dict[str, Any]", environ: "Mapping[str, str]", signals: Signals, console: Console
) -> None:
    """Run the pipeline: posts from Reddit or a file, rows, transactions."""
    import contextlib
    import gc

    import pipeline

    files = contextlib.ExitStack()
    check_options(arguments)
    names = parse_subreddits(arguments["<subreddit>"])
    fields = pipeline.parse_fields(arguments["--field"])
    interval = parse_interval(arguments["--interval"])
    if arguments["--from"] is not None:
        file = files.enter_context(pipeline.open_file(arguments["--from"]))
        source, state = from_file(file, names)
    else:
        access = read_access(environ)
        source, state = from_reddit(
            access, names, interval, once=arguments["--once"], signals=signals
        )

    gc.freeze()
    gc.enable()
    stored, started = 0, time.monotonic()
    with (
        files,
        pipeline.Database(arguments["<database>"], fields, shield=lambda: signals) as database,
    ):
        for batch in source(database):
            rows = [pipeline.transform(post, fields) for post in batch.posts]
            stored += pipeline.load(database, rows, batch.cursors, batch.gaps)
            rate = stored / max(time.monotonic() - started, 1.0)
            console.progress(f"redpipe: {stored:,} posts stored, {rate:,.1f}/s, {state(batch)}")


def main(argv: "list[str]") -> int:
    """Run the program and give its exit status; a signal ends the process later on."""
    import gc

    gc.disable()  # of what imports make nothing is garbage; to look costs 5 % of a start
    signals = Signals()
    console = Console(sys.stderr)
    try:
        signals.listen()
        try:
            arguments = parse_arguments(argv)
        except SystemExit as error:
            if error.code is None:
                raise
            console.write(f"redpipe: {usage_message(error)}\n")
            return 64
        from pipeline import RedpipeError

        logger = log_to(console, arguments)
        try:
            run(arguments, os.environ, signals, console)
        except RedpipeError as error:
            logger.error("%s", error)
            return error.exit_status
        return 0
    except Stopped:
        return 0
    finally:
        signals.holds += 1  # exit handlers are not to be disturbed
        console.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
