"""Servers for the tests of endpoints: vLLM's own, and one that fails as it is told.

The first is the real one, from the folder that `make test` installs it in (`endpoint_server.txt` says of what); it
runs on this environment's own PyTorch and Transformers.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VLLM = Path(__file__).parents[1] / "build" / "vllm"
START_SECONDS = 400  # it takes 60 on two free cores


@contextmanager
def vllm_server(model: Path, api_key: str, log: Path) -> Iterator[str]:
    """vLLM's server on loopback, in float32; yields its URL.

    Args:
        model: a Transformers folder; served as "tiny".
        api_key: that it asks for.
        log: the file that its output goes to.
    """
    assert VLLM.is_dir(), f"{VLLM} is missing: run `make build/vllm`"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": model, "served-model-name": "tiny", "host": "127.0.0.1", "port": port, "api-key": api_key}
    options |= {"dtype": "float32", "max-model-len": 256, "max-num-seqs": 4}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {
        **os.environ,
        "PYTHONPATH": str(VLLM),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other tests run beside it
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the server's own process: one start instead of two
        "VLLM_CACHE_ROOT": str(log.parent / "vllm_cache"),
        "VLLM_CONFIG_ROOT": str(log.parent / "vllm_config"),
    }
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)


def _wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
        try:
            with opener.open(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server at {url}: {log.read_text()[-2000:]}")


class Answer(Exception):
    """What a faulty server answers instead of a completion: a status, headers and a body."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


class Cut(Exception):
    """The connection is cut in the middle of the body."""


class FaultyServer:
    """A server on loopback that answers what a function makes of each request.

    Attributes:
        requests: the bodies that have come, in their order.
        keys: their Authorization headers, or None.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any], *, seconds_a_byte: float = 0) -> None:
        """Begin to serve.

        Args:
            answer: the JSON for a request's; it may raise `Answer` or `Cut`.
            seconds_a_byte: how slowly bodies are sent, byte by byte; 0 sends them at once.
        """
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.keys.append(self.headers.get("Authorization"))
                status, headers, cut = 200, {}, False
                try:
                    body = answer(request)
                except Answer as other:
                    status, body, headers = other.status, other.body, other.headers
                except Cut:
                    body, cut = {"choices": []}, True
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(content) + 100 * cut)}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for piece in [content] if not seconds_a_byte else [bytes([byte]) for byte in content]:
                        self.wfile.write(piece)
                        time.sleep(seconds_a_byte)
                except OSError:
                    pass  # the client has stopped waiting

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
