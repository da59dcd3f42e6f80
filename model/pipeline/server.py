"""Invoke mode: a server that runs the job in the input folder each time it is asked to."""

import signal
from collections.abc import Callable, Iterable
from threading import Lock
from types import FrameType
from typing import Any

from model.pipeline.batch import print_line
from model.pipeline.case_runner import StopRequest

THREADS = 32  # that many may wait for their job while /health is still answered
FAILED = "500 Internal Server Error"
Invoke = Callable[[], str | None]  # runs a job; returns what is wrong in a sentence, or None


def application(invoke: Invoke, one_at_a_time: Lock) -> Callable[..., Iterable[bytes]]:
    """The WSGI application (PEP 3333).

    GET /health answers 200; POST /invoke runs one job at a time and answers 201, or 500 with the
    sentence. A job that fails leaves the server as it was.
    """

    def respond(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/invoke" and method == "POST":
            with one_at_a_time:
                wrong = invoke()
            status, text = ("201 Created", "done") if wrong is None else (FAILED, wrong)
        elif path == "/health" and method in ("GET", "HEAD"):
            status, text = "200 OK", "ready"
        elif path in ("/invoke", "/health"):
            status, text = "405 Method Not Allowed", "expected POST /invoke or GET /health"
        else:
            status, text = "404 Not Found", "expected POST /invoke or GET /health"
        body = text.encode(errors="replace") + b"\n"
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
        ]
        start_response(status, headers)
        return [body] if method != "HEAD" else []

    return respond


def serve(invoke: Invoke, port: int, stop: StopRequest) -> int:
    """Serve on all interfaces until SIGTERM or SIGINT; returns the exit status, 0.

    Args:
        stop: takes the signal. A running job then ends soon and is waited for. A signal that came
            before ends the server before it starts.

    Raises:
        OSError: the port cannot be had.
    """
    from waitress.server import create_server  # noqa: PLC0415  not needed for a single run

    one_at_a_time = Lock()
    respond = application(invoke, one_at_a_time)
    server = create_server(respond, host="0.0.0.0", port=port, threads=THREADS, ident=None)

    def end(number: int, frame: FrameType | None) -> None:
        stop.request(number)
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    print_line(f"serving on port {port}: POST /invoke runs the job in the input folder")
    if stop.signal is None:
        server.run()
    with one_at_a_time:  # a job still runs
        pass
    server.task_dispatcher.shutdown()  # its answer is still to be sent
    server.close()
    print_line("stopped")
    return 0
