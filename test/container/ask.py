"""Send a request to an invoke server and check its status: ask.py METHOD PATH STATUS [PORT]

Waits up to a minute for a server that is not up yet. Needs only the standard library. Exits 1 if
the status is another.
"""

import sys
import time
import urllib.error
import urllib.request


def ask(method: str, path: str, port: str) -> tuple[int, str]:
    """Status and body of the answer; (0, reason) without one."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


method, path, expected, port = (*sys.argv[1:], "4743")[:4]
end = time.monotonic() + 60
while (found := ask(method, path, port))[0] == 0 and time.monotonic() < end:
    time.sleep(0.1)
print(f"{method} {path}: {found[0]} {found[1].strip()}")
raise SystemExit(found[0] != int(expected))
