"""What the network interface that a rank uses can carry, as far as the system knows."""

from __future__ import annotations

import contextlib
from pathlib import Path

from phalanx.comm.rendezvous import interface_addresses

_SYSTEM = Path("/sys/class/net")


def link_bytes_per_s(address: str, system: Path = _SYSTEM) -> float | None:
    """The rate of the interface that has this address of this machine; None where it is not known.

    That of loopback is none, and what virtual interfaces say of themselves (10 Gbit/s for a veth pair of any rate) is
    not believed.
    """
    for name, mine in interface_addresses().items():
        if mine == address and (system / name / "device").exists():
            with contextlib.suppress(OSError, ValueError):  # EINVAL while the link is down
                mbits_per_s = int((system / name / "speed").read_text())
                return mbits_per_s * 1e6 / 8 if mbits_per_s > 0 else None
    return None
