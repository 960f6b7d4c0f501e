"""A program that serves a model from one host over all of them, told by lines of JSON what to do: see `NetEngine`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.multinode.net_host import Seats
from tests.multinode.netlab import Net

ROOT = Path(__file__).parents[2]
ANSWER_LIMIT_S = 60.0


class NetEngine:
    """The program's other end, in the test. One formation at a time."""

    def __init__(self, net: Net, hosts: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """hosts: of each rank; the program runs in the first. env: with which it joins a Ray that runs there, which
        then says where ranks go.
        """
        seats = Seats.of(net, hosts).to_json() if env is None else ""
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        self.process: subprocess.Popen[str] = net.popen(
            hosts[0],
            [sys.executable, "-m", "tests.multinode.net_engine", seats],
            env={**(env or {}), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def open(self, config: Mapping[str, Any]) -> list[str]:
        """Starts a formation; what was decided, and why."""
        told: list[str] = self.ask("open", config=config)
        return told

    def close(self) -> None:
        """Ends the formation."""
        self.ask("close")

    def start(self, do: str, **arguments: Any) -> None:
        """Says what to do; `answer` waits for what came of it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], ANSWER_LIMIT_S)[0]
        assert ready, f"the engine gave no answer within {ANSWER_LIMIT_S:g} s"
        line = self.process.stdout.readline()
        assert line, f"the engine's program ended with {self.process.wait(10)}"
        return json.loads(line)

    def ask(self, do: str, **arguments: Any) -> Any:
        self.start(do, **arguments)
        return self.answer()


class _Program:
    def __init__(self, seats: Seats | None) -> None:
        self._seats = seats

    def open(self, config: dict[str, Any]) -> list[str]:
        from phalanx import LLM
        from phalanx.launcher.config import load_config
        from phalanx.launcher.formation import open_host

        opens = open_host if self._seats is None else self._seats.open
        self._llm = LLM.from_config(load_config(config), open_host=opens)
        return [f"{each.name}: {each.choice}: {each.reason}" for each in self._llm.startup.decisions]

    def close(self) -> str:
        self._llm.close()
        return "closed"

    def generate(self, prompts: list[Any], max_tokens: int, started: str = "", stop: str = "") -> dict[str, Any]:
        """Tokens and seconds of each round, over and over until the file `stop` is there; `started` is written after
        three rounds. Without files one round.
        """
        tokens, times_s = [], []
        last = False
        while not last:
            last = not stop or Path(stop).exists()
            began_s = time.monotonic()
            tokens.append(self._round(prompts, max_tokens))
            times_s.append(time.monotonic() - began_s)
            if started and len(tokens) == 3:
                Path(started).touch()
        return {"tokens": tokens, "times_s": times_s}

    def fail(self, prompts: list[list[int]], max_tokens: int, started: str = "") -> list[dict[str, Any]]:
        """A call for each prompt, over and over, until each has raised: its error."""

        def call(prompt: list[int]) -> dict[str, Any]:
            try:
                while True:
                    self._round([prompt], max_tokens)
                    if started:
                        Path(started).touch()
            except Exception as error:
                return {"type": type(error).__name__, "message": str(error), "rank": getattr(error, "rank", None)}

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(call, prompts))

    def transfers(self) -> dict[str, Any]:
        """What all ranks have summed so far, by the ledger: bytes, seconds. overlaps: what is told of hiding them."""
        while not self._llm.all_is_told():
            time.sleep(0.02)
        ops = ("all_reduce", "fused_all_reduce_rms_norm")
        sums = [each for mine in self._llm.comm_totals()[0].values() for each in mine if each.op in ops]
        return {
            "bytes": sum(each.num_bytes for each in sums),
            "seconds": sum(each.exposed_us + each.hidden_us for each in sums) / 1e6,
            "overlaps": [*self._llm.comm_overlaps()[0].values()],
        }

    def _round(self, prompts: list[Any], max_tokens: int) -> list[list[int]]:
        from phalanx import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return [list(output.token_ids) for output in self._llm.generate(prompts, params)]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch prints must not get between the answers
    program = _Program(Seats.from_json(sys.argv[1]) if sys.argv[1] else None)
    for line in sys.stdin:
        arguments = json.loads(line)
        answers.write(json.dumps(getattr(program, arguments.pop("do"))(**arguments)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
