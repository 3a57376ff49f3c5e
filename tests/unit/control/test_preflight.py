"""What a check of the configuration remarks on without refusing it."""

from pathlib import Path

import pytest

from rlsys.control import transports
from rlsys.control.preflight import check_config
from rlsys.control.transports import require_transport
from rlsys.errors import ConfigError
from tests.fakes import make_config

SHARED = ("weights.transport=ipc", "resources.learner_gpus=0.5", "resources.rollout_gpus=0.5")


def test_an_audit_at_rounded_weights_is_remarked_on() -> None:
    def remarks(*overrides: str) -> list[str]:
        return check_config(make_config(Path("/nowhere"), *overrides))

    assert remarks("audit.every=5") == remarks("rollout.dtype=bfloat16") == []
    (remark,) = remarks("audit.every=5", "rollout.dtype=bfloat16")
    assert "audit.every=5" in remark
    assert "rollout.dtype=bfloat16; the learner's are float32" in remark


def test_a_gpu_transport_may_be_checked_where_it_cannot_run_but_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(Path("/nowhere"), *SHARED)
    monkeypatch.setattr(transports, "_why_not_here", lambda name: "no GPU" if name in ("nccl", "ipc") else None)
    assert "weights.transport=ipc: not possible here (no GPU); it was not tried" in check_config(config)
    with pytest.raises(ConfigError, match=r"weights\.transport=ipc: no GPU.*allowed here: object_store, gloo\."):
        require_transport(config)
    require_transport(make_config(Path("/nowhere"), *SHARED, "resources.address=10.0.0.1:6379"))
    require_transport(make_config(Path("/nowhere"), "weights.transport=gloo"))
    monkeypatch.setattr(transports, "_why_not_here", lambda name: None)
    require_transport(config)
    assert not any("transport" in remark for remark in check_config(config))
