"""Looks after a run once a second: takes from every role what it did, for the trace, and notices a stalled one."""

import asyncio

from rlsys.control.history import History
from rlsys.control.ports import Parts, RolePort, WorkerLost
from rlsys.control.progress import Progress
from rlsys.observability.spans import Span

EVERY_S = 1.0

ANSWER_S = 5.0
"""A role that does not answer within this time is asked again the next time."""


async def watch(parts: Parts, progress: Progress, history: History) -> None:
    """Until cancelled."""
    while True:
        await asyncio.sleep(EVERY_S)
        history.announce(history.alarms.idle(progress.version, progress.activity.idle_s()))
        await collect_spans(parts, progress)
        parts.journal.tick()


async def collect_spans(parts: Parts, progress: Progress) -> None:
    """Write what every role did since the last call."""
    parts.journal.spans("controller", progress.spans.take())
    names, ports = list(parts.roles), list(parts.roles.values())
    for name, spans in zip(names, await asyncio.gather(*map(_spans, ports)), strict=True):
        parts.journal.spans(name, spans)


async def _spans(port: RolePort) -> list[Span]:
    try:
        return await asyncio.wait_for(port.spans(), ANSWER_S)
    except (WorkerLost, TimeoutError):  # the loops notice a dead role themselves
        return []
