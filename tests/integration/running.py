"""Real runs of the command line: started in a process group of their own, watched, and looked for afterwards."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from rlsys.observability.run_directory import read_jsonl

PATIENCE_S = 600
"""Longest wait for something that takes seconds on an idle machine."""

LOOK_S = 0.5
"""Between two looks at the processes of a command."""

SCRATCH = re.compile(re.escape(f"{tempfile.gettempdir()}/rlsys-") + r"\w+")
"""Where a run keeps Ray's files; its Ray processes have it in their arguments."""

SMALL: dict[str, Any] = {
    "name": "run",
    "run_dir": "runs",
    "model": {
        "tiny": {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 128},
        "warmstart": {"steps": 150, "batch_size": 64, "label_noise": 0.2},
        "max_context": 16,
    },
    "task": {"name": "arithmetic", "digits": 1, "eval_size": 40},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": 4, "max_concurrent_sequences": 64},
    "staleness": {"max": 3},
    "kl": {"coef": 0.001},
    "learner": {"steps": 10, "lr": 5e-4, "warmup_steps": 3},
    "eval": {"every": 5, "max_prompts": 40},
    "checkpoint": {"every": 4, "keep": 2},
    "resources": {"object_store_gib": 0.25},
}
"""A run of seconds: 60 questions to train on, so that ten steps of eight prompts go through more than one epoch."""


def write_config(directory: Path, **sections: Mapping[str, Any] | str) -> None:
    """`run.yaml` in `directory`: SMALL with fields changed, or a section of another `name` in its place.

    The warm-started model is shared by all tests.
    """
    SMALL["model"]["warmstart"]["cache_dir"] = str(directory.parent / "warmstart")
    merged = {
        name: {**SMALL.get(name, {}), **value} if isinstance(value, Mapping) and "name" not in value else value
        for name, value in sections.items()
    }
    (directory / "run.yaml").write_text(yaml.safe_dump({**SMALL, **merged}))


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `seen` are the names of its processes, `left` what was still there a while later:
    processes of its own, its scratch directory, and files in /dev/shm that are new and that nobody maps.

    `listened` are the addresses on which the parts of its Ray cluster listened, `scratch` their directories.
    """

    code: int
    stdout: str
    stderr: str
    seen: list[str]
    left: list[str]
    listened: set[str]
    scratch: set[str]


@dataclass
class Running:
    """A command under way: every process that was its own at any time, and the directories that those named.

    `before` is the shared memory that was there when it started.
    """

    process: subprocess.Popen[str]
    output: Path
    before: set[str]
    pids: dict[int, tuple[float, str]] = field(default_factory=dict)
    scratch: set[str] = field(default_factory=set)
    listened: set[str] = field(default_factory=set)

    def watch(self) -> None:
        """Note descendants, and the addresses on which they listen, until the command ends."""
        me = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [me, *me.children(recursive=True)]:
                    self._note(process)
            time.sleep(LOOK_S)

    def _note(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            arguments = " ".join(process.cmdline())
            self.pids[process.pid] = process.create_time(), arguments[:200]
            self.scratch |= set(SCRATCH.findall(arguments))
            if process.name() in ("gcs_server", "raylet"):
                self.listened |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the command brings about."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"it ended early:\n{self.stderr}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.stderr}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends it to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, within_s: float = PATIENCE_S, linger_s: float = 30) -> Outcome:
        """Wait for the command to end by itself, and look for what it left behind `linger_s` later."""
        code = self.process.wait(timeout=within_s)
        deadline = time.monotonic() + linger_s
        while self._left() and time.monotonic() < deadline:
            time.sleep(0.2)
        seen = [name for _, name in self.pids.values()]
        return Outcome(code, self.stdout, self.stderr, seen, self._left(), self.listened, self.scratch)

    def _left(self) -> list[str]:
        return [
            *(f"{process.pid} {self.pids[process.pid][1]}" for process in self.alive()),
            *unused((shared_memory() - self.before) | {name for name in self.scratch if Path(name).exists()}),
        ]

    def alive(self) -> list[psutil.Process]:
        """The processes of the command that have not ended."""
        found = []
        for pid, (started, _) in list(self.pids.items()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    @property
    def stdout(self) -> str:
        return (self.output / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.output / "stderr").read_text()


def shared_memory() -> set[str]:
    """The files in /dev/shm. Ray's and vLLM's that are still there by name will not go by themselves."""
    return {str(path) for path in Path("/dev/shm").iterdir()}


def unused(names: set[str]) -> list[str]:
    """Those of this user that no living process names or maps: others may be at work beside a test."""
    if not names:
        return []
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            found += [*process.cmdline(), Path(f"/proc/{process.pid}/maps").read_text()]
    told = "\n".join(found)
    return sorted(name for name in names if name not in told and _is_ours(name))


def _is_ours(name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(name).lstat().st_uid == os.getuid()
    return False


def _as_from_a_terminal() -> None:
    """Ctrl-C interrupts: who runs the tests in the background of a shell hands down that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def running(directory: Path, *arguments: str, **variables: str) -> Iterator[Running]:
    """`rlsys ARGUMENTS` in `directory`, with environment variables added to a user's.

    Whatever of it is left when the block ends, fails or not, is killed.
    """
    yield from _started(directory, [sys.executable, "-m", "rlsys.cli", *arguments], variables)


@contextlib.contextmanager
def module(directory: Path, *arguments: str, **variables: str) -> Iterator[Running]:
    """The same for `python -m ARGUMENTS`."""
    yield from _started(directory, [sys.executable, "-m", *arguments], variables)


def rlsys(directory: Path, *arguments: str) -> Outcome:
    """`rlsys ARGUMENTS` in `directory`, to its end."""
    with running(directory, *arguments) as run:
        return run.finish()


def python(directory: Path, *arguments: str, **variables: str) -> Outcome:
    """`python ARGUMENTS` in `directory`, to its end."""
    with contextlib.contextmanager(_started)(directory, [sys.executable, *arguments], variables) as run:
        return run.finish()


@contextlib.contextmanager
def program(directory: Path, *command: str, **variables: str) -> Iterator[Running]:
    """Any other program, watched and cleared away like `running`."""
    yield from _started(directory, command, variables)


def _started(directory: Path, command: Sequence[str], variables: Mapping[str, str]) -> Iterator[Running]:
    output = directory / f"output-{len(list(directory.glob('output-*')))}"
    output.mkdir()
    before = shared_memory()
    with (output / "stdout").open("w") as out, (output / "stderr").open("w") as err:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**environment(), **variables},
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
            preexec_fn=_as_from_a_terminal,
        )
        run = Running(process, output, before)
        watcher = threading.Thread(target=run.watch, daemon=True)
        watcher.start()
        try:
            yield run
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            watcher.join()
            for left in run.alive():
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()


def environment() -> dict[str, str]:
    """A user's environment: without what importing vLLM or Ray here has set."""
    ours = ("VLLM_", "RAY_", "TORCH", "OMP_", "MKL_", "PYTEST_", "CUDA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    root = str(Path(__file__).parents[2])
    patient = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": str(PATIENCE_S)}
    return {**kept, **patient, "PYTHONPATH": root, "COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}


def rows(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON-lines file, but for one that is being written at this moment."""
    return list(read_jsonl(path))


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` that are learner steps."""
    return [row for row in rows(run_dir / "metrics.jsonl") if "reward/mean" in row]


def responses(run_dir: Path) -> list[dict[str, Any]]:
    """Every recorded response of a run, in the order of its steps."""
    return [
        row for path in sorted((run_dir / "rollouts").glob("step-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
