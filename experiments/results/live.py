"""The page of a report from a local server, as it is now: for runs in progress."""

import http.server
import threading
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from experiments.results import page
from experiments.results.collect import find_runs, read_run, short_names

HOST = "127.0.0.1"  # this machine alone
EVERY = 5  # seconds between two looks of a page
_FILES = ("config.json", "metrics.jsonl", "result.json", "sparse.safetensors")  # what a page is made of


class Live:
    """The newest page of the runs in some folders, drawn again when a file of theirs has changed.

    Args:
      folders: of runs, or of folders of runs; they may be empty as yet.
      title: of the page.
    """

    def __init__(self, folders: Sequence[Path], title: str):
        self._folders, self._title = folders, title
        self._drawn: tuple[object, str] | None = None
        self._lock = threading.Lock()  # Matplotlib draws one picture at a time

    def page(self) -> tuple[HTTPStatus, str]:
        """The page, or one that says what is wrong."""
        with self._lock:
            try:
                paths = find_runs(self._folders)
                stamp = [(path, _changed(path)) for path in paths]  # before reading: what is written then is news
                if self._drawn is None or self._drawn[0] != stamp:
                    runs = [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]
                    self._drawn = stamp, page.report(runs, self._title, refresh=EVERY)
                return HTTPStatus.OK, self._drawn[1]
            except (ValueError, OSError) as error:
                return HTTPStatus.SERVICE_UNAVAILABLE, page.notice(f"{error}", self._title, EVERY)


def make_server(live: Live, port: int) -> http.server.ThreadingHTTPServer:
    """A server of the page at "/", for this machine alone; the port 0 takes a free one.

    Raises:
      OSError: if the port is not free, or none.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers with the page."""

        def do_GET(self) -> None:
            """Sends the page."""
            if self.path.partition("?")[0] != "/":
                return self.send_error(HTTPStatus.NOT_FOUND)
            status, text = live.page()
            body = text.encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:  # the browser was closed meanwhile
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            """Nothing: a page asks every few seconds."""

    # Threads, since browsers hold connections open over which they ask nothing; they end with the program.
    try:
        return http.server.ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"--port={port}: {getattr(error, 'strerror', None) or error}; --port=0 takes a free one"
        ) from error


def serve(folders: Sequence[Path], title: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises:
      OSError: if a folder is not there, or the port is not free.
    """
    import matplotlib

    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    matplotlib.use("agg")  # pictures are drawn in threads, where windows cannot be
    with make_server(Live(folders, title), port) as server:
        print(f"http://{HOST}:{server.server_port} shows the runs; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _changed(path: Path) -> list[tuple[int, int] | None]:
    """The time of change and the size of each file of a run, None for one that is not there."""
    stats = [file.stat() if (file := path / name).exists() else None for name in _FILES]
    return [stat and (stat.st_mtime_ns, stat.st_size) for stat in stats]
