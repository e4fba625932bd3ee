"""A real S3 server in this process, on the loopback interface, with credentials of its own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer


class S3Server:
    """moto's server; ``url`` is its endpoint."""

    def __init__(self, url: str, client: Any) -> None:
        self.url = url
        self.client = client

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[S3Server]:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "test-key", "aws_secret_access_key": "test-secret"}
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        try:
            yield cls(url, client)
        finally:
            client.close()
            server.stop()

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Point this process's AWS environment, and only that, at the server."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", self.url)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def new_bucket(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """Name of an empty bucket; the environment points at it."""
        self.use(monkeypatch)
        name = f"bucket-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return name
