"""`configs/deploy/slurm.sh`, run for real between stand-ins for Slurm's commands, Ray and Phalanx."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.recipes import DEPLOY, LAST_WORDS_S, parse_phalanx, parse_ray

from phalanx.launcher.schema import ServeSection

SCRIPT = DEPLOY / "slurm.sh"
RAY_DRAIN_S = 30  # a node of Ray's takes up to this long to end on SIGTERM

# Each stand-in writes a line for each call; the name of the node it runs on comes first.
STANDINS = {
    "scontrol": 'echo "first scontrol $*" >> log; echo "$3" | tr , "\\n"',
    "srun": """
        echo "first srun $*" >> log
        while [[ $1 == --* ]]; do
            [[ $1 == --nodelist=* ]] && IFS=, read -ra nodes <<< "${1#*=}"
            shift
        done
        trap 'over=yes; kill -TERM "${steps[@]}"' TERM
        for NODE in "${nodes[@]}"; do NODE=$NODE "$@" & steps+=($!); done
        [[ -z $over ]] || kill -TERM "${steps[@]}"
        wait; wait
        """,
    "ray": """
        trap 'echo "ended $NODE" >> log; exit 0' TERM
        echo "${NODE:-first} ray $*" >> log
        echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> tokens
        if [[ $1 == health-check ]]; then [[ -e head ]]; exit; fi
        [[ -e no-head ]] && exit 4
        echo "$*" >> nodes
        [[ " $* " == *" --head "* ]] && sleep 0.1 && touch head
        while :; do sleep 0.05; done
        """,
    "python": """
        trap 'exit 143' TERM
        echo "first python $*" >> log
        [[ -e no-nodes ]] && exit 1
        while [[ -e forever ]] || (($(wc -l < nodes) < NUM_NODES)); do sleep 0.05; done
        """,
    "phalanx": """
        trap 'sleep 0.3; echo "ended server" >> log; exit 0' TERM
        echo "first phalanx $*" >> log
        [[ -e exit-code ]] && exit "$(cat exit-code)"
        while :; do sleep 0.05; done
        """,
    "sleep": 'exec /bin/sleep "${1/#2/0.05}"',
}


class Job:
    """A job of Slurm's, as the script sees one."""

    def __init__(self, folder: Path, nodes: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, body in STANDINS.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}")
            (folder / "bin" / name).chmod(0o755)
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_CPUS_ON_NODE": "8",
            "NUM_NODES": str(len(nodes.split(","))),
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str]:
        """Waits for the script's end; returns its exit code and standard error."""
        assert self.process is not None
        try:
            _, errors = self.process.communicate(timeout=20)
        finally:
            self.kill()
        return self.process.returncode, errors

    def kill(self) -> None:
        """Ends whatever is left, stand-ins that nobody ended included."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def run(self, *arguments: str) -> int:
        self.start(*arguments)
        return self.end()[0]

    def terminate(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def await_calls(self, command: str, number: int = 1) -> None:
        deadline = time.monotonic() + 20
        while len(calls(self.log(), command)) < number:
            assert time.monotonic() < deadline, f"fewer than {number} calls of {command!r} in {self.log()}"
            time.sleep(0.02)

    def say(self, name: str, text: str = "") -> None:
        """Tells the stand-ins something, by a file that they look for."""
        (self.folder / name).write_text(text)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, "first,second,third")
    yield job
    job.kill()


def calls(log: list[str], command: str, node: str = "") -> list[str]:
    """What was called with `command`, in order, each with the node it was called on before it."""
    return [line for line in log if line.startswith(node) and line.partition(" ")[2].startswith(command)]


def ended(log: list[str]) -> list[str]:
    """What was ended by SIGTERM, in order: `server`, and the nodes whose Ray was."""
    return [line.removeprefix("ended ") for line in log if line.startswith("ended ")]


def directive(name: str) -> str:
    found = re.search(rf"^#SBATCH --{name}=(\S+)$", SCRIPT.read_text(), flags=re.MULTILINE)
    assert found is not None, f"no #SBATCH --{name}"
    return found.group(1)


def test_bash_can_read_it() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_slurm_warns_the_shell_alone_and_early_enough_to_drain_and_end_ray() -> None:
    who, name, seconds = re.split("[:@]", directive("signal"))
    assert (who, name) == ("B", "TERM")
    assert int(seconds) >= ServeSection().drain_timeout_s + LAST_WORDS_S + RAY_DRAIN_S


def test_workers_start_once_the_head_answers_and_the_server_once_all_nodes_are_there(job: Job) -> None:
    job.say("exit-code", "0")
    assert job.run("config.yaml") == 0
    log = job.log()
    (answered, *_) = [log.index(line) for line in reversed(log) if "health-check" in line]
    joined = [log.index(line) for node in ("second", "third") for line in calls(log, "ray start", node)]
    (waited,) = [log.index(line) for line in calls(log, "python")]
    (served,) = [log.index(line) for line in calls(log, "phalanx serve")]
    assert log.index(calls(log, "ray start", "first")[0]) < min(joined)
    assert answered < min(joined) and max(*joined, waited) < served, log


def test_every_node_runs_ray_once_and_all_of_them_are_given_the_address_of_the_first(job: Job) -> None:
    job.say("exit-code", "0")
    job.run("config.yaml")
    starts = {line.split()[0]: line for line in calls(job.log(), "ray start")}
    assert len(calls(job.log(), "ray start")) == len(starts) == 3
    assert "--head" in starts["first"] and "--port=24567" in starts["first"]
    assert all("--address=first:24567" in starts[node] for node in ("second", "third"))
    (wait,) = calls(job.log(), "python")
    assert "--address first:24567 --nodes 3 " in wait
    (serve,) = calls(job.log(), "phalanx")
    assert "--set cluster.ray=first:24567 config.yaml" in serve


def test_ray_may_use_all_cores_of_its_node(job: Job) -> None:
    job.say("exit-code", "0")
    job.run("config.yaml")
    for line in calls(job.log(), "srun"):
        assert "--cpus-per-task=8 --cpu-bind=none ray start --num-cpus=8 " in line


def test_a_job_of_one_node_has_no_workers(tmp_path: Path) -> None:
    job = Job(tmp_path, "first")
    job.say("exit-code", "0")
    assert job.run("config.yaml") == 0
    assert len(calls(job.log(), "srun")) == 1


def test_all_of_a_job_share_a_token_that_the_next_job_does_not_know(tmp_path: Path) -> None:
    tokens = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        job = Job(tmp_path / name, "first,second")
        job.say("exit-code", "0")
        job.run("config.yaml")
        (token,) = set((tmp_path / name / "tokens").read_text().splitlines())
        assert re.fullmatch("token [0-9a-f]{64}", token)
        tokens.append(token)
    assert tokens[0] != tokens[1]


def test_what_follows_the_configuration_goes_to_the_server_as_it_is(job: Job) -> None:
    job.say("exit-code", "0")
    job.run("my config.yaml", "--set", "model=/a b", "--port", "9000")
    (serve,) = calls(job.log(), "phalanx")
    assert serve.endswith("my config.yaml --set model=/a b --port 9000")


def test_on_sigterm_the_server_drains_before_ray_ends_and_the_job_succeeds(job: Job) -> None:
    job.start("config.yaml")
    job.await_calls("phalanx serve")
    job.terminate()
    assert job.end()[0] == 0
    server, *nodes = ended(job.log())
    assert server == "server" and sorted(nodes) == ["first", "second", "third"]


def test_the_exit_code_is_the_servers_and_ray_ends_with_it(job: Job) -> None:
    job.say("exit-code", "3")
    assert job.run("config.yaml") == 3
    assert sorted(ended(job.log())) == ["first", "second", "third"]


def test_where_the_nodes_do_not_come_nothing_is_served_and_ray_ends(job: Job) -> None:
    job.say("no-nodes")
    assert job.run("config.yaml") == 1
    assert calls(job.log(), "phalanx") == []
    assert "first" in ended(job.log())


def test_where_the_head_does_not_start_the_job_fails_at_once(job: Job) -> None:
    job.say("no-head")
    assert job.run("config.yaml") == 1
    assert len(calls(job.log(), "srun")) == 1 and calls(job.log(), "phalanx") == []


def test_sigterm_before_there_is_a_server_ends_the_job(job: Job) -> None:
    job.say("forever")
    job.start("config.yaml")
    job.await_calls("ray start", 3)
    job.await_calls("python")
    job.terminate()
    assert job.end()[0] == 128 + signal.SIGTERM
    assert calls(job.log(), "phalanx") == []
    assert sorted(ended(job.log())) == ["first", "second", "third"]


def test_without_a_configuration_it_says_how_it_is_used_and_starts_nothing(job: Job) -> None:
    job.start()
    code, errors = job.end()
    assert code == 2 and errors.startswith("usage: sbatch slurm.sh CONFIG")
    assert job.log() == []


def test_every_command_has_options_that_there_are(job: Job) -> None:
    job.say("exit-code", "0")
    job.run("config.yaml", "--set", "parallel.tensor=2")
    for line in calls(job.log(), "ray"):
        parse_ray(line.split()[2:])
    (wait,) = calls(job.log(), "python")
    subprocess.run([sys.executable, *wait.split()[2:], "--help"], check=True, stdout=subprocess.DEVNULL, timeout=60)
    (serve,) = calls(job.log(), "phalanx")
    parse_phalanx(serve.split()[2:])
