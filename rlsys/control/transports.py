"""Which `weights.transport` works on this machine: for `rlsys doctor`, for `--check`, and before a run starts here."""

from collections.abc import Mapping, Sequence
from typing import get_args

from rlsys.config.schema import RunConfig
from rlsys.config.transport import ON_GPU, Transport
from rlsys.errors import ConfigError

TRANSPORTS: tuple[str, ...] = get_args(Transport)


def why_not(transport: str, devices: Sequence[str], versions: Mapping[str, str]) -> str | None:
    """What the transport lacks where these GPUs and packages are; None: nothing that can be seen."""
    if transport not in ON_GPU:
        return None
    torch = versions.get("torch", "")
    if not torch:
        return "torch is not installed"
    if torch.endswith("+cpu"):
        return f"torch {torch} is a CPU build"
    if "vllm" not in versions:
        return "vLLM's GPU build is not installed"
    if not devices:
        return "nvidia-smi lists no GPU"
    return None


def require_transport(config: RunConfig) -> None:
    """Raise ConfigError when a run on this machine alone could not move its weights; elsewhere its actors look."""
    transport = config.weights.transport
    if transport not in ON_GPU or config.resources.address is not None:
        return
    lacks = {name: reason for name in TRANSPORTS if (reason := _why_not_here(name)) is not None}
    if transport in lacks:
        allowed = ", ".join(name for name in TRANSPORTS if name not in lacks)
        raise ConfigError(
            f"weights.transport={transport}: {lacks[transport]} on this machine; allowed here: {allowed}. "
            "resources.address names a cluster that has what it needs"
        )


def remark(config: RunConfig) -> list[str]:
    """The same as a remark: a configuration may be checked where it will not run."""
    reason = _why_not_here(config.weights.transport)
    if reason is None:
        return []
    return [f"weights.transport={config.weights.transport}: not possible here ({reason}); it was not tried"]


def _why_not_here(transport: str) -> str | None:
    from rlsys.control.doctor import PACKAGES, gpus, installed

    return why_not(transport, gpus(), installed(PACKAGES)) if transport in ON_GPU else None
