"""An S3-compatible server on loopback, in a thread of this process: moto's, which keeps everything in memory."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


@dataclass
class S3Server:
    """A server that runs, and that fails on demand.

    Attributes:
        environment: what leads there; it is set while the server runs, so processes that are started have it too.
        fault: asked with each request's method and path for a status to answer in its place, such as 503; None lets it
            pass.
    """

    environment: dict[str, str]
    fault: Callable[[str, str], int | None] = lambda method, path: None

    def make_bucket(self) -> str:
        """The URL of a new, empty bucket."""
        name = f"bucket-{uuid4().hex}"
        boto3.client("s3").create_bucket(Bucket=name)
        return f"s3://{name}"


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server, and the environment that leads there."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or each request is a line
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "not-so-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # or a missing key would be asked for on the network
        "NO_PROXY": host,
    }
    server = S3Server(environment)
    answer = moto._server.app

    def application(request: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        status = server.fault(request["REQUEST_METHOD"], request["PATH_INFO"])
        if status is None:
            return answer(request, start_response)
        request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        start_response(f"{status} fault", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{status}</Code><Message>as was asked for</Message></Error>".encode()]

    moto._server.app = application
    try:
        with patch.dict(os.environ, environment):
            S3FileSystem.clear_instance_cache()  # connections are kept, whatever the environment says later
            yield server
    finally:
        S3FileSystem.clear_instance_cache()
        moto.stop()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """One server for a module's tests, which import this fixture."""
    with s3_server() as server:
        yield server
