"""One process of the pool in `rank_pool.py`: runs functions of test files as one rank of a group.

Reads one JSON object a line from standard input and answers each with one: {"ok": value} or {"error": {...}}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator, connect_store, create, create_communicator
from phalanx.comm.machine import own_seat


def serve(rendezvous: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch prints must not get between the answers
    torch.set_num_threads(1)
    store = connect_store(rendezvous, 20.0)
    modules: dict[str, Any] = {}
    communicators: dict[str, Communicator] = {}
    answers.write('"ready"\n')
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            value = _run(request, store, modules, communicators)
            answer = {"ok": value}
        except Exception as error:
            answer = {
                "error": {
                    "type": type(error).__name__,
                    "message": str(error),
                    "missing": getattr(error, "missing_ranks", None),
                    "guilty": getattr(error, "guilty_ranks", None),
                    "peer": getattr(error, "peer", None),
                    "traceback": traceback.format_exc(),
                }
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(
    request: dict[str, Any], store: Store, modules: dict[str, Any], communicators: dict[str, Communicator]
) -> object:
    file = request["file"]
    if file not in modules:
        spec = importlib.util.spec_from_file_location(f"case_{len(modules)}", file)
        assert spec is not None
        assert spec.loader is not None
        modules[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[file])
    function = getattr(modules[file], request["function"])
    machine = request["machine"]
    create.own_seat = lambda obstacle="": own_seat(obstacle)._replace(  # type: ignore[attr-defined]
        **({"host": machine, "boot": machine} if machine else {})
    )
    name = request["group"]
    if name not in communicators:
        communicators[name] = create_communicator(
            request["backend"],
            rank=request["rank"],
            size=request["size"],
            rendezvous=store,
            group=name,
            timeout_s=request["timeout_s"],
        )
    try:
        return function(communicators[name], store, **request["arguments"])
    finally:
        if request["fresh"]:
            communicators.pop(name).close()


if __name__ == "__main__":
    serve(sys.argv[1])
