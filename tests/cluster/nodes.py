"""Ray nodes on one machine, each with processes of its own, that can be lost and replaced."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

SMALL = {"object_store_memory": 100 * 2**20}  # bytes, in place of a third of the machine's for each node


class Nodes:
    """A head, which runs no worker, and nodes of one CPU each."""

    def __init__(self, workers: int, environment: Mapping[str, str]) -> None:
        from ray.cluster_utils import Cluster

        # What workers import, they import from here.
        tests = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        # Ray's workers give way to all else by default: beside other tests, they would starve.
        self.environment = {**environment, "PYTHONPATH": tests.rstrip(os.pathsep), "RAY_worker_niceness": "0"}
        self.workers: list[Any] = []
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.client_port = server.getsockname()[1]
        head = {"num_cpus": 0, "include_dashboard": False, "ray_client_server_port": self.client_port, **SMALL}
        with patch.dict(os.environ, self.environment):
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.restore(workers)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def lose(self, number: int) -> None:
        """A node is gone at once, with all that runs there."""
        self.cluster.remove_node(self.workers.pop(number), allow_graceful=False)

    def restore(self, workers: int) -> None:
        """As many nodes as there were."""
        with patch.dict(os.environ, self.environment):
            while len(self.workers) < workers:
                self.workers.append(self.cluster.add_node(num_cpus=1, **SMALL))

    def scoring(self) -> list[psutil.Process]:
        """The processes that score parts, of these nodes alone."""
        found = []
        for node in self.workers:
            for started in node.all_processes["raylet"]:
                for process in psutil.Process(started.process.pid).children(recursive=True):
                    try:
                        if "PartWorker" in " ".join(process.cmdline()):
                            found.append(process)
                    except psutil.NoSuchProcess:
                        continue
        return found

    def shutdown(self) -> None:
        self.cluster.shutdown()
