"""grand-challenge's invoke mode: a server that answers the job in the input folder on request."""

import signal
from collections.abc import Callable, Iterable
from threading import Lock
from types import FrameType
from typing import Any

from model.pipeline.batch import print_line
from model.pipeline.case_runner import StopRequest

THREADS = 32  # all but one can wait for their job while /health is still answered
FAILED = "500 Internal Server Error"
Invoke = Callable[[], str | None]  # runs a job; returns a sentence about what went wrong, or None


def wsgi_application(invoke: Invoke, one_at_a_time: Lock) -> Callable[..., Iterable[bytes]]:
    """The server's WSGI application (PEP 3333).

    GET /health answers 200. POST /invoke runs one job at a time and answers 201, or 500 with the
    sentence that `invoke` returned. The server goes on after a job that failed.
    """

    def respond(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/invoke" and method == "POST":
            with one_at_a_time:
                sentence = invoke()
            status, text = ("201 Created", "done") if sentence is None else (FAILED, sentence)
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
        stop: receives the signal, so that a running job ends soon; the server waits for its end.
            If a signal came earlier, the server does not start.

    Raises:
        OSError: the port is taken or may not be used.
    """
    from waitress.server import create_server  # noqa: PLC0415  a single run does not need it

    one_at_a_time = Lock()
    respond = wsgi_application(invoke, one_at_a_time)
    server = create_server(respond, host="0.0.0.0", port=port, threads=THREADS, ident=None)

    def end(number: int, frame: FrameType | None) -> None:
        stop.request(number)
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    print_line(f"serving on port {port}: POST /invoke runs the job in the input folder")
    if stop.signal is None:
        server.run()
    with one_at_a_time:  # wait for the running job
        pass
    server.task_dispatcher.shutdown()  # and until its answer is sent
    server.close()
    print_line("stopped")
    return 0
