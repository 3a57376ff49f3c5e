"""When a run audits its gradients, and with which weights."""

from collections.abc import Sequence

from rlsys.config.schema import AuditConfig
from rlsys.control.ports import AuditPort, FinishedGroup, Journal, PayloadLost, WorkerLost
from rlsys.errors import RlsysError
from rlsys.versions import PolicyVersion
from rlsys.weights.transport import WeightTicket


class Auditor:
    """Audits the batch of every N-th step at the weights that step began with.

    Holds a published version, and so its bytes in the object store, only until the batch trained from it is
    audited, and only if that one is due. One audit that fails is an event: it does not concern training.
    """

    def __init__(self, config: AuditConfig, port: AuditPort, journal: Journal) -> None:
        self._every, self._prompts, self._port, self._journal = config.every, config.prompts, port, journal
        self._tickets: dict[PolicyVersion, WeightTicket] = {}

    def published(self, ticket: WeightTicket) -> None:
        """A version exists, before any batch is trained from it."""
        if self._due(ticket.manifest.version + 1):
            self._tickets[ticket.manifest.version] = ticket

    async def metrics(self, version: PolicyVersion, batch: Sequence[FinishedGroup]) -> dict[str, float | None]:
        """`audit/*` of the batch that made `version`; nothing when it is not due, or could not be audited."""
        ticket = self._tickets.pop(version - 1, None)
        if ticket is None:
            return {}
        try:
            return dict(await self._port.audit(batch[: self._prompts], ticket))
        except (RlsysError, WorkerLost, PayloadLost) as error:
            self._journal.event("audit_failed", f"version {version}: {error}")
            return {}

    def _due(self, version: PolicyVersion) -> bool:
        return version % self._every == 0
