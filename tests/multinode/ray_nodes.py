"""Ray in the hosts of a net: the head in the first, a raylet in each other one."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.multinode.netlab import Net

PORT = 6379
START_LIMIT_S = 40.0
STORE_BYTES = 80 << 20
# A node is taken for dead after about 6 s of silence instead of 60. The token: without one of its own a cluster would
# take that of the user, where there is one.
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "6",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RayNodes(NamedTuple):
    """A cluster that runs. net: the hosts. address: of its head. env: what a driver needs to join it."""

    net: Net
    address: str
    env: Mapping[str, str]


@contextlib.contextmanager
def ray_nodes(net: Net, num_cpus: int, env: Mapping[str, str]) -> Iterator[RayNodes]:
    """Starts Ray in the hosts of `net`, the head in the first, and on the way out ends all that runs in them.

    num_cpus: that each host offers. env: variables for Ray and its workers. Raises RuntimeError, with Ray's own words,
    where it does not come up.
    """
    env = {**env, **SETTINGS, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    directory = Path(tempfile.mkdtemp(prefix="phx-", dir="/tmp"))  # short: the path of a socket has at most 107 bytes
    address = f"{next(iter(net.hosts.values())).address}:{PORT}"
    role = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={directory / 'ray'}"]
    try:
        for host in net.hosts.values():
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block", "--disable-usage-stats"]
            command += [f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}"]
            command += [f"--object-store-memory={STORE_BYTES}"]
            log = directory / f"{host.name}.log"
            with log.open("wb") as stream:
                process = net.popen(host.name, command, env=env, stdout=stream, stderr=subprocess.STDOUT)
            _wait_for_line(log, process, "Ray runtime started")
            role = [f"--address={address}"]
        yield RayNodes(net, address, env)
    finally:
        net.end_processes()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for_line(log: Path, process: subprocess.Popen[bytes], line: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while line not in (text := log.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start within {START_LIMIT_S:g} s: {text[-2000:]}")
        time.sleep(0.1)
