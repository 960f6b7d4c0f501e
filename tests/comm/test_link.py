"""What is known of a network interface, from a made-up system."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.comm import link


def interface(system: Path, name: str, speed: str, *, real: bool = True) -> None:
    (system / name).mkdir()
    (system / name / "speed").write_text(speed)
    if real:
        (system / name / "device").mkdir()


def test_the_rate_is_that_of_the_interface_with_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"eth0": "10.0.0.1", "eth1": "10.0.1.1", "veth": "10.0.2.1", "lo": "127.0.0.1"}
    monkeypatch.setattr(link, "interface_addresses", lambda: addresses)
    interface(tmp_path, "eth0", "25000\n")
    interface(tmp_path, "eth1", "-1\n")  # down, or not known to the driver
    interface(tmp_path, "veth", "10000\n", real=False)
    assert link.link_bytes_per_s("10.0.0.1", tmp_path) == 25e9 / 8
    for address in ("10.0.1.1", "10.0.2.1", "127.0.0.1", "192.0.2.1"):
        assert link.link_bytes_per_s(address, tmp_path) is None
