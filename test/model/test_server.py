"""Invoke mode: a server that answers one job after the other."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from model.pipeline.server import wsgi_application
from test.support.runs import ANGLE, POINTS, job, load, made, png, tree, volume

pytestmark = pytest.mark.slow  # each starts a server

ROOT = Path(__file__).resolve().parents[2]
JOBS = int(os.environ.get("AOP_JOBS", "30"))  # 1000 in a long run


class Server:
    """process.py --serve on a free port."""

    def __init__(
        self, folder: Path, program: Sequence[str] = (sys.executable, "process.py")
    ) -> None:
        self.input, self.output = folder / "in", folder / "out"
        self.input.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [*program, "--serve", "--serve-port", str(self.port)]
        command += ["--input", str(self.input), "--output", str(self.output)]
        self.log = (folder / "log").open("w+b")
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + 60
        while self.ask("GET", "/health")[0] != 200:
            assert time.monotonic() < end and self.process.poll() is None, "it did not start"
            time.sleep(0.05)

    def ask(self, method: str, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException):  # the server has not started, or has ended
            return 0, ""
        finally:
            connection.close()

    def invoke(self) -> tuple[int, str]:
        return self.ask("POST", "/invoke")

    def new_job(self) -> Path:
        """An empty job; returns the folder of its image."""
        for path in self.input.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.input / "images").mkdir()
        return job(self.input)

    def memory(self) -> int:
        """Bytes that the process holds now."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    yield started
    started.process.kill()
    started.process.wait()


def test_jobs_one_after_the_other(server: Server) -> None:
    volume(server.new_job() / "a.mha", made(1)[None], Spacing=(0.5, 0.5, 1))
    assert server.invoke() == (201, "done\n")
    assert tree(server.output) == sorted([POINTS, ANGLE, "results.json", "landmarks.csv"])
    first = load(server.output / ANGLE)
    volume(server.new_job() / "b.mha", made(2)[None])
    assert server.invoke()[0] == 201
    assert load(server.output / ANGLE) != first
    assert [e["file"] for e in load(server.output / "results.json")["cases"]] == ["images/us/b.mha"]
    (server.new_job() / "c.mha").write_text("no image")
    status, sentence = server.invoke()
    assert status == 500 and sentence.startswith("the case failed: 'images/us/c.mha': the content")
    assert tree(server.output) == ["landmarks.csv", "results.json"]
    png(server.new_job() / "d.png")
    assert server.invoke()[0] == 201
    assert server.stop() == 0 and server.said().endswith("stopped\n")


def test_a_job_that_cannot_begin_leaves_no_earlier_answer(server: Server) -> None:
    png(server.new_job() / "a.png")
    assert server.invoke()[0] == 201
    (server.input / "inputs.json").write_text("{")
    status, sentence = server.invoke()
    assert status == 500 and sentence.startswith("inputs.json cannot be read as JSON")
    assert not {POINTS, ANGLE, "results.json"} & {*tree(server.output)}
    shutil.rmtree(server.input)
    assert server.invoke()[0] == 500 and server.ask("GET", "/health") == (200, "ready\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", "200 OK"),
        ("POST", "/invoke", "201 Created"),
        ("GET", "/invoke", "405 Method Not Allowed"),
        ("POST", "/health", "405 Method Not Allowed"),
        ("GET", "/", "404 Not Found"),
        ("POST", "/invoke/", "404 Not Found"),
    ],
)
def test_requests(method: str, path: str, status: str) -> None:
    said = []
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path}
    body = wsgi_application(lambda: None, threading.Lock())(
        environ, lambda *args: said.append(args)
    )
    (answer, headers) = said[0]
    assert answer == status and dict(headers)["Content-Length"] == str(len(b"".join(body)))


def test_one_job_at_a_time_and_health_meanwhile() -> None:
    running, most, release = [0], [0], threading.Event()

    def invoke() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        release.wait(10)
        running[0] -= 1

    respond = wsgi_application(invoke, threading.Lock())
    post = {"REQUEST_METHOD": "POST", "PATH_INFO": "/invoke"}
    threads = [threading.Thread(target=respond, args=(post, print)) for _ in range(3)]
    for thread in threads:
        thread.start()
    health = {"REQUEST_METHOD": "GET", "PATH_INFO": "/health"}
    assert respond(health, lambda *_: None) == [b"ready\n"]
    release.set()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_stop_in_the_middle_of_a_job_leaves_whole_files(server: Server) -> None:
    stack = np.stack([made(k % 3) for k in range(60)])
    volume(server.new_job() / "a.mha", stack)
    thread = threading.Thread(target=server.invoke)
    thread.start()
    while not (server.output / ".results.json.journal").is_file():
        time.sleep(0.01)
    assert server.stop() == 0
    thread.join()
    for name in tree(server.output):
        if name.endswith(".json"):
            load(server.output / name)
    assert not [name for name in tree(server.output) if name.endswith(".partial")]


def test_a_job_that_outlasts_the_stop_is_answered(tmp_path: Path) -> None:
    """The server alone would wait only 5 s. A client whose job has not begun gets a sentence."""
    code = (
        "import os, time, process\n"
        "process.run_batch = lambda *_: (time.sleep(7), (0, ''))[1]\n"
        "process.select_cases = lambda _: []\n"
        "process.load_model = lambda *_: None; os._exit(process.main())"
    )
    server = Server(tmp_path, [sys.executable, "-c", code])
    server.output.mkdir()
    (server.output / "results.json").write_text("of the job before")
    answers: list[tuple[int, str]] = []
    clients = [threading.Thread(target=lambda: answers.append(server.invoke())) for _ in range(2)]
    for client in clients:
        client.start()
        time.sleep(0.5)
    assert not (server.output / "results.json").exists()
    (server.output / "results.json").write_text("of this job")
    assert server.stop() == 0
    for client in clients:
        client.join()
    assert sorted(answers) == [(201, "done\n"), (500, "the server is stopping\n")]
    assert (server.output / "results.json").exists()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = subprocess.run(
            [sys.executable, "process.py", "--serve", "--serve-port", str(port)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 2
    assert (
        ran.stderr
        == f"port {port} cannot be used (Address already in use); choose another --serve-port\n"
    )


def test_many_jobs_a_tenth_of_them_bad(server: Server) -> None:
    """Good jobs are answered, and memory does not grow; AOP_JOBS=1000 makes it a long run."""
    kinds = [
        lambda path: png(path / "a.png", made(1)),
        lambda path: volume(path / "a.mha", made(2)),
    ]
    memory = []
    for number in range(JOBS):
        folder = server.new_job()
        bad = number % 10 == 3
        if bad:
            (folder / "a.mha").write_bytes(b"NDims = 2\nDimSize = 9 9\n" * (number % 3))
        else:
            kinds[number % 2](folder)
        status, sentence = server.invoke()
        assert status == (500 if bad else 201), sentence
        assert (POINTS in tree(server.output)) is not bad
        memory.append(server.memory())
    settled = JOBS // 3
    assert max(memory[settled:]) < memory[settled] + 2**24, json.dumps(memory)
