"""The process: version, arguments, environment, signals, terminal, exit status."""

import sys

if sys.version_info < (3, 10):  # this file must parse on Python 3.6 to say so
    sys.exit(
        "redpipe needs Python 3.10 or newer; this is %d.%d (%s)"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import os
import select
import signal
import time
from _thread import allocate_lock
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # typing's own costs milliseconds at every start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, TextIO

    import pipeline
    from pipeline import Batch, Cursor, Database, Row, Survey

    Span = tuple[int, int]
    Tell = Callable[[], str]
else:

    class Late:
        """The module pipeline, imported at its first use: --help and --version need none."""

        def __getattr__(self, name: str) -> "Any":
            import pipeline

            return getattr(pipeline, name)

    pipeline = Late()

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
  --recheck=HOURS     Ask Reddit again about the posts that it was last asked about HOURS
                      ago or earlier, erase what was deleted there, refresh the
                      fields, then exit.
  --status            Show what is stored and how complete it is, then exit.
  -q, --quiet         Say errors only.
  -v, --verbose       Say what every poll did.
  -h, --help          Show this text.
  --version           Show the version.

Credentials come from the environment: see Credentials in README.
"""

CONFLICTS = {  # none of the second goes with the first
    "--from": ("--once", "--recheck", "--status", "--interval", "--print"),
    "--recheck": ("--once", "--status", "--interval", "--print"),
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
        """Stop. If that is lost in a finalizer, the next transaction's end stops."""
        if not self.number:
            self.number = number
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
            # Python complains of one that comes while its handler is being replaced.
            signal.pthread_sigmask(signal.SIG_BLOCK, [self.number])
            signal.signal(self.number, signal.SIG_DFL)
            os.kill(os.getpid(), self.number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [self.number])


class Console:
    """Standard error: messages and, on a terminal, a line below them that lives.

    Control characters, which messages may have from outside, are not written. A closed
    standard error is not an error, and a terminal that takes nothing is not waited for.
    """

    def __init__(self, stream: "TextIO | None") -> None:
        self.stream = stream
        self.terminal = stream is not None and stream.isatty() and os.name == "posix"
        self.lives = self.terminal
        self.line = ""
        self.lock = allocate_lock()

    def write(self, message: str) -> None:
        """Write a message above the line; what a logging handler calls."""
        printable = "".join(c if c.isprintable() else "\ufffd" for c in message.rstrip("\n"))
        with self.lock:
            blank = " " * len(self.line) + "\r" if self.line else ""
            self._put(blank + printable + "\n" + self.line)

    def live(self, tell: "Tell") -> None:
        """Show what `tell` returns, from now on and anew every second, until `close`."""
        import threading

        def draw() -> None:
            # A signal that comes to this thread might not wake the main one.
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
        with self.lock, suppress(OSError):  # the terminal may be gone
            if self.lives:
                width = os.get_terminal_size(2).columns or 80
                line = line[: width - 1]
                self._put(line.ljust(len(self.line)))
                self.line = line

    def _put(self, text: str) -> None:
        try:
            # Ctrl-S stops a terminal; capturing does not wait for it.
            if self.stream and (not self.terminal or select.select([], [2], [], 0.5)[1]):
                self.stream.write("\r" * self.terminal + text)
                self.stream.flush()
        except (OSError, ValueError):
            # What is left in its buffer would fail once more at exit, and make that 120.
            self.stream = sys.stderr = None


def say(text: str, signals: Signals) -> None:
    """Write to standard output, at once. Raises StorageFailed, or Stopped by SIGPIPE."""
    left = text.encode()
    try:
        while left:  # past Python's buffer, which would be written once more at exit
            left = left[os.write(sys.stdout.fileno(), left) :]
    except BrokenPipeError:
        signals.arrived(signal.SIGPIPE, None)
    except (OSError, AttributeError) as exc:  # it is None when it was closed at the start
        reason = getattr(exc, "strerror", "closed")
        raise pipeline.StorageFailed(f"standard output: {reason}") from exc


def parse_arguments(argv: "list[str]") -> "dict[str, Any]":
    """Read the command line. Raises BadUsage."""
    from docopt import docopt

    usage = USAGE.replace("<database>", "[<database>]")  # the check of options comes first
    try:
        arguments = dict(docopt(usage, argv, default_help=False))
    except SystemExit as error:
        import re

        check_options({word.partition("=")[0] for word in argv})
        unmatched = re.findall(r"'([^']*)'", str(error).partition("\n")[0])
        words = "unknown or repeated: " + " ".join(unmatched) if unmatched else "wrong options"
        raise pipeline.BadUsage(f"{words}; see redpipe.pyz --help") from None
    check_options({option for option, value in arguments.items() if value not in (None, False, [])})
    return arguments


def check_options(given: "set[str]") -> None:
    """Raise BadUsage for options that do not go together."""
    for one, others in CONFLICTS.items():
        for other in given.intersection(others if one in given else ()):
            raise pipeline.BadUsage(f"{one} and {other} do not go together")


def parse_subreddits(arguments: "list[str]") -> "list[str]":
    """Read python, r/python, /r/python/ and a+b as lower-case names, each once."""
    import re

    names = []
    for argument in arguments:
        if argument.lower().endswith((".db", ".sqlite", ".sqlite3")):
            raise pipeline.BadUsage(f"{argument}: the database comes first, then the subreddits")
        for name in re.sub(r"^/?r/|/$", "", argument).split("+"):
            if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise pipeline.BadUsage(
                    f"{argument}: not a subreddit name, like python, r/python or a+b"
                )
            names.append(name.lower())
    return list(dict.fromkeys(names))


def parse_number(
    arguments: "dict[str, Any]", option: str, default: float, bounds: "tuple[float, float]"
) -> float:
    """Read an option's number: of seconds, or of hours. Raises BadUsage."""
    text = default if arguments[option] is None else arguments[option]
    with suppress(ValueError):
        if bounds[0] <= float(text) <= bounds[1]:
            return float(text)
    raise pipeline.BadUsage(f"{option}={text}: not a number from {bounds[0]} to {bounds[1]}")


def read_access(environ: "Mapping[str, str]") -> "pipeline.Access":
    """Read where to ask, and with which credentials. Raises BadEnvironment."""
    import re

    names = ("REDPIPE_URL", "REDDIT_CLIENT_ID", "REDDIT_CLIENT_SECRET")
    url, client_id, secret = (environ.get(name, "").strip() for name in names)
    user, token = (environ.get(f"REDDIT_{name}", "").strip() for name in ("USERNAME", "FEED_TOKEN"))
    if url and ("@" in url or not is_address(url)):  # not repeated: it may hold a password
        raise pipeline.BadEnvironment("REDPIPE_URL: not of the form http(s)://host[:port][/path]")
    if not re.fullmatch(r"[A-Za-z0-9_-]*", user):
        raise pipeline.BadEnvironment("REDDIT_USERNAME: not the name of an account")
    if secret and not client_id:
        raise pipeline.BadEnvironment("REDDIT_CLIENT_SECRET is set, but REDDIT_CLIENT_ID is not")
    if token and not user:
        raise pipeline.BadEnvironment("REDDIT_FEED_TOKEN is set, but REDDIT_USERNAME is not")
    if (client_id or token) and url.lower().startswith("http:") and not pipeline.is_loopback(url):
        raise pipeline.BadEnvironment("REDPIPE_URL: credentials go to other machines by https only")
    check_proxies(environ, url or pipeline.WWW_URL)
    check_certificates(environ)
    agent = f"{sys.platform}:redpipe:{VERSION}" + (f" (by /u/{user})" if user else "")
    return pipeline.Access(url.rstrip("/"), client_id, secret, user, token, agent)


def is_address(url: str) -> bool:
    """Return whether it is of the form http(s)://[user:password@]host[:port][/path]."""
    import re

    host = r"([^\s/?#]*@)?([\w.-]+|\[[0-9a-f:.]+\])"
    match = re.fullmatch(rf"https?://{host}(:(?P<port>\d+))?(/[^\s?#]*)?", url, re.IGNORECASE)
    return match is not None and url.isprintable() and 0 < int(match["port"] or 80) < 65536


def check_proxies(environ: "Mapping[str, str]", url: str) -> None:
    """Raise BadEnvironment if the proxy that requests would take can never work."""
    from urllib.parse import urlsplit
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    target = urlsplit(url)
    exempt = {"no": environ.get("no_proxy") or environ.get("NO_PROXY", "")}
    kinds = (target.scheme + "_proxy", "all_proxy")
    names = [name for kind in kinds for name in (kind, kind.upper()) if environ.get(name)]
    if names and not proxy_bypass_environment(target.hostname, exempt):
        proxy = environ[names[0]]
        if not is_address(proxy if "://" in proxy else "http://" + proxy):
            raise pipeline.BadEnvironment(
                f"{names[0]}: not of the form http(s)://host:port; SOCKS is not spoken"
            )


def check_certificates(environ: "Mapping[str, str]") -> None:
    """Raise BadEnvironment for a file or folder that holds no certificate."""
    import glob
    import ssl

    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        path = environ.get(name, "")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for file in glob.glob(glob.escape(path) + "/*") or [path]:
            with suppress(OSError):
                context.load_verify_locations(file)
        if path and not context.cert_store_stats()["x509"]:
            raise pipeline.BadEnvironment(f"{name}: not a file or folder that holds a certificate")


def open_network() -> "pipeline.Fetch":
    """Import requests, whose certificates go from the archive to a temporary file."""
    import tempfile

    try:
        with tempfile.TemporaryFile() as file:  # a full disk would cut them off in silence
            file.write(bytes(2**19))
        return pipeline.http_fetch()
    except OSError as exc:
        raise pipeline.StorageFailed(
            f"temporary directory {tempfile.tempdir or ''}: {exc.strerror or exc}; set TMPDIR"
        ) from exc


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


def share_done(file: "Any", seconds: float) -> str:
    """Say how much of FILE was read in so many seconds, and when a regular one will be done.

    It looks at two numbers only, so a thread may call it at any time, even on a closed file.
    """
    size, taken = file.raw.size, file.raw.taken  # of a CountingFile
    speed = f"{taken / 1e6 / max(seconds, 0.1):,.0f} MB/s"
    if not 0 < taken <= size:  # a pipe, or a file that grows
        return f"{taken / 1e6:,.0f} MB read, {speed}"
    left = duration(seconds * (size - taken) / taken)
    return f"{100 * taken // size} % of {size / 1e6:,.0f} MB read, {speed}, {left} left"


def source_of(access: "pipeline.Access") -> str:
    from urllib.parse import urlsplit

    credentials = "a feed token" if access.feed_token else "no credentials"
    credentials = "an app" if access.client_id else credentials
    return f"from {urlsplit(access.url).hostname or 'Reddit'} with {credentials}"


def standing(reddit: "pipeline.Reddit") -> str:
    """Say what is going on, for how long, and what is left of the budget."""
    what, until = reddit.doing
    if until is not None:  # what comes next, or what lasts
        left = duration(until - reddit.clock.monotonic() + 0.999)
        what += (" in " if "next" in what else ": ") + left
    return f"{what}, {reddit.budget.free(reddit.clock.monotonic()):,} requests left"


def duration(seconds: float) -> str:
    """Say how long something takes, in the largest unit of which there are two."""
    units = ((86400, "d"), (3600, "h"), (60, "min"))
    size, unit = next((unit for unit in units if seconds >= 2 * unit[0]), (1, "s"))
    return f"{max(0, int(seconds)) // size:,} {unit}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


class Progress:
    """What came to be stored, how old the newest post is, and how many come a minute.

    That is by the times of the last five minutes' posts: how fast one catches up tells nothing.
    """

    def __init__(self, standing: "Tell") -> None:
        self.standing = standing
        self.stored = self.gaps = self.newest = 0
        self.recent: list[int] = []

    def add(self, stored: int, rows: "Sequence[Row]", batch: "Batch") -> None:
        self.stored += stored
        self.gaps += len(batch.gaps)
        for cursor in batch.cursors:
            self.newest = max(self.newest, cursor.newest_utc)
            self.recent += [row["created_utc"] or 0 for row in rows]

    def line(self) -> str:
        now, seen = time.time(), ""
        if self.newest:
            self.recent = [at for at in self.recent if at > now - 300]
            seen = f"{len(self.recent) / 5:,.1f}/min, newest {duration(now - self.newest)} ago, "
        return f"redpipe: {counted(self.stored, 'post')} stored, {seen}{self.standing()}"

    def result(self) -> str:
        return f"{counted(self.stored, 'post')} stored, {counted(self.gaps, 'gap')}"


ROW = "{:22.22} {:10} {:16} {:>7} {:>10} {:>4} {:>8} {}"  # at most 100 columns


def status_table(survey: "Survey", cursors: "Sequence[Cursor]", now: int) -> "list[str]":
    """Lay out a line for each cursor."""
    lines = [ROW.format("name", "since", "until", "poll", "posts", "gaps", "span", "last 14 days")]
    for name, since, newest, polled in cursors:
        gaps = [(after, before) for owner, after, before in survey.gaps if owner == name]
        posts = survey.posts[name]
        poll = duration(now - polled) if polled else "never"
        span = duration(sum(before - after for after, before in gaps)) if gaps else ""
        drawn = bar(posts, (since, max(newest, polled)), gaps, now // 86400)
        counts = f"{sum(posts.values()):,}", f"{len(gaps):,}"
        lines.append(ROW.format(name, utc(since)[:10], utc(newest), poll, *counts, span, drawn))
    return lines


def utc(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) if seconds else "-"


def bar(posts: "Mapping[int, int]", covered: "Span", gaps: "Sequence[Span]", today: int) -> str:
    """Draw the posts of the last 14 days, today's last, by the day that had most."""
    days = range(today - 13, today + 1)
    most = max(1, *(posts.get(day, 0) for day in days))
    drawn = ""
    for day in days:
        level = "▁▂▃▄▅▆▇█"[-(-7 * posts.get(day, 0) // most)]
        drawn += "!" if touches(day, gaps) else level if touches(day, [covered]) else "·"
    return drawn


def touches(day: int, spans: "Sequence[Span]") -> bool:
    return any(first // 86400 <= day <= last // 86400 for first, last in spans)


class Run:
    """One run: what was asked for, and the process it runs in."""

    def __init__(self, arguments: "dict[str, Any]", signals: Signals, console: Console) -> None:
        self.arguments = arguments
        self.signals = signals
        self.console = console
        self.path: str = arguments["<database>"]
        if self.path is None:
            raise pipeline.BadUsage("missing <database>; see redpipe.pyz --help")
        self.names = parse_subreddits([name for name in arguments["<subreddit>"] if name != "--"])
        self.fields = pipeline.parse_fields(arguments["--field"])
        self.interval = parse_number(arguments, "--interval", 25, (1, 3600))
        self.hours = parse_number(arguments, "--recheck", 0, (0, 1_000_000))

    def follow(self) -> None:
        """Store what is new on Reddit."""
        access, names = read_access(os.environ), self.names or ["all"]
        once = self.arguments["--once"]
        verb = "polling" if once else "following"
        reddit = self.open_reddit(access)
        with self.open_database() as database:
            batches = pipeline.stream(reddit, names, database, interval=self.interval, once=once)
            what = f"{verb} {pipeline.several(names)} {source_of(access)}"
            self.store(database, batches, what, lambda: standing(reddit))

    def open_reddit(self, access: "pipeline.Access") -> "pipeline.Reddit":
        with self.signals.held():  # an import that was broken off would leave its file behind
            return pipeline.Reddit(access, open_network())

    def open_database(self) -> "Database":
        return pipeline.Database(self.path, self.fields, hold=self.signals.held)

    def import_file(self) -> None:
        """Store the posts of a file."""
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
        import json

        progress, transform = Progress(standing), pipeline.transform
        with self.told(what, progress.line, progress.result):
            for batch in batches:
                rows = [transform(post, self.fields) for post in batch.posts]
                if self.arguments["--print"]:
                    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                    say("".join(lines), self.signals)
                stored = pipeline.load(database, rows, batch.cursors, batch.gaps)
                progress.add(stored, rows, batch)

    def recheck(self) -> None:
        """Ask about stored posts again, erase what was deleted and refresh the fields."""
        import random
        from collections import Counter

        access = read_access(os.environ)
        if not access.client_id:
            raise pipeline.BadEnvironment("--recheck needs an app; see README, Credentials")
        pipeline.check_exists(self.path)
        reddit, counts = self.open_reddit(access), Counter[str]()

        def line() -> str:
            done = "{asked:,} of {due:,} asked, {erased:,} erased".format_map(counts)
            return f"redpipe: {done}, {standing(reddit)}"

        def result() -> str:
            told = "{asked:,} asked, {refreshed:,} refreshed, {erased:,} erased"
            return told.format_map(counts)

        with self.open_database() as database:
            asker = pipeline.Asker(reddit, once=True, chance=random.random, modest=True)
            what = f"rechecking {pipeline.several(self.names) or 'all posts'} {source_of(access)}"
            with self.told(what, line, result):
                for part in pipeline.recheck(asker, database, self.names, self.fields, self.hours):
                    counts.update(part)

    @contextmanager
    def told(self, what: str, line: "Tell", result: "Tell") -> "Iterator[None]":
        """Say how it goes: at the beginning, all the time, and at the end."""
        import gc

        gc.enable()
        pipeline.log.info("%s into %s; Ctrl-C stops it", what, self.path)
        if not (self.arguments["--quiet"] or self.arguments["--print"]):
            self.console.live(line)
        try:
            yield
        finally:
            self.console.close()
            pipeline.log.info("%s", result())

    def show_status(self) -> None:
        """Print what is stored of each name. Raises Failed if one was not polled lately."""
        now = int(time.time())
        survey = pipeline.survey(self.path, now // 86400 - 13)
        known = {cursor.subreddit: cursor for cursor in survey.cursors}
        names = sorted(known) if not self.names or "all" in self.names else self.names
        cursors = [known.get(name) or pipeline.Cursor(name, 0, 0, 0) for name in names]
        count, gaps = sum(survey.posts["all"].values()), len(survey.gaps)
        sums = f"{counted(count, 'post')}, {survey.erased:,} erased, {counted(gaps, 'gap')}"
        if survey.checked_utc:
            sums += f", last recheck {duration(now - survey.checked_utc)} ago"
        total = f"{sums}, {os.path.getsize(self.path) / 1e6:,.1f} MB in all"
        say("\n".join([*status_table(survey, cursors, now), total, ""]), self.signals)
        stale = [cursor.subreddit for cursor in cursors if cursor.polled_utc < now - 3600]
        if stale:
            raise pipeline.Failed(f"{pipeline.several(stale)}: not polled within the last hour")


def run(argv: "list[str]", signals: Signals, console: Console) -> None:
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
    elif arguments["--recheck"] is not None:
        run.recheck()
    else:
        run.follow()


def main(argv: "list[str]") -> int:
    """Run the program and return its exit status; a signal ends the process later on."""
    import gc

    gc.disable()  # imports create no garbage; not looking for it saves 5 % of a start
    signals = Signals()
    console = Console(sys.stderr)
    try:
        signals.listen()
        try:
            run(argv, signals, console)
        except pipeline.RedpipeError as error:
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
