"""What a check of the configuration remarks on without refusing it."""

from pathlib import Path

from rlsys.control.preflight import check_config
from tests.fakes import make_config


def test_an_audit_at_rounded_weights_is_remarked_on() -> None:
    def remarks(*overrides: str) -> list[str]:
        return check_config(make_config(Path("/nowhere"), *overrides))

    assert remarks("audit.every=5") == remarks("rollout.dtype=bfloat16") == []
    (remark,) = remarks("audit.every=5", "rollout.dtype=bfloat16")
    assert "audit.every=5" in remark
    assert "rollout.dtype=bfloat16; the learner's are float32" in remark
