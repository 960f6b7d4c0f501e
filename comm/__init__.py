"""Communicators and channels between ranks, rendezvous and the ledger of every transfer.

Names are loaded when they are first used: importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phalanx.comm.communicator import Communicator, Handle
    from phalanx.comm.create import Choice, choose_backend, create_communicator, register_backend
    from phalanx.comm.group import GroupSpec
    from phalanx.comm.ledger import Ledger, LedgerEntry, OpTotals
    from phalanx.comm.rendezvous import connect_store, host_store, local_address, parse_rendezvous
    from phalanx.comm.work import GroupBrokenError, PeerLostError, WaitTimeoutError

_HOMES = {
    "Choice": "create",
    "Communicator": "communicator",
    "GroupBrokenError": "work",
    "GroupSpec": "group",
    "Handle": "communicator",
    "Ledger": "ledger",
    "LedgerEntry": "ledger",
    "OpTotals": "ledger",
    "PeerLostError": "work",
    "WaitTimeoutError": "work",
    "choose_backend": "create",
    "connect_store": "rendezvous",
    "create_communicator": "create",
    "host_store": "rendezvous",
    "local_address": "rendezvous",
    "parse_rendezvous": "rendezvous",
    "register_backend": "create",
}

__all__ = [
    "Choice",
    "Communicator",
    "GroupBrokenError",
    "GroupSpec",
    "Handle",
    "Ledger",
    "LedgerEntry",
    "OpTotals",
    "PeerLostError",
    "WaitTimeoutError",
    "choose_backend",
    "connect_store",
    "create_communicator",
    "host_store",
    "local_address",
    "parse_rendezvous",
    "register_backend",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"phalanx.comm.{_HOMES[name]}"), name)
