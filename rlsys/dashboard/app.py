"""The dashboard's addresses. Runs are numbered in the order they were given: no path comes from a request."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from rlsys.dashboard.guard import Guard
from rlsys.dashboard.recorded import histogram, staleness_map
from rlsys.dashboard.run import Run, as_json
from rlsys.dashboard.series import downsample
from rlsys.dashboard.tokens import SORTS, Decoder, response, responses
from rlsys.errors import RlsysError
from rlsys.observability.catalogue import CATALOGUE

STATIC = Path(__file__).parent / "static"
LOOK_S = 1.0
"""Between two looks at the files while somebody watches."""
HEARTBEAT = 15
"""Looks without news before a comment keeps the connection open."""
DIGEST_S = 0.4
"""Longest that one request reads recorded tokens; the page asks again for the rest."""
MOST_NAMES = 200

Scale = Callable[[Mapping[str, int]], None]
"""Asks the live run that is served for so many workers of each role that is named. Raises RlsysError."""


class Pages:
    """Answers, each from one run and in a worker thread."""

    def __init__(self, runs: Sequence[Run], stopping: threading.Event, scale: Scale | None) -> None:
        self._runs = list(runs)
        self._scale = scale
        self._decoders = [Decoder(run.directory.checkpoints) for run in runs]
        self._stopping = stopping

    def routes(self) -> list[Route | Mount]:
        """All addresses."""
        one = "/api/runs/{run:int}"
        return [
            Route("/", _index),
            Route("/api/runs", self._answer(self._list)),
            Route("/api/catalogue", self._answer(_catalogue)),
            Route("/api/stream", self._stream),
            Route(f"{one}/series", self._answer(self._series)),
            Route(f"{one}/staleness", self._answer(self._staleness)),
            Route(f"{one}/histogram", self._answer(self._histogram)),
            Route(f"{one}/timeline", self._answer(self._timeline)),
            Route(f"{one}/responses", self._answer(self._responses)),
            Route(f"{one}/response", self._answer(self._response)),
            Route(f"{one}/workers", self._workers, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]

    def _answer(self, page: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            return _json(await run_in_threadpool(page, request))

        return endpoint

    def _run(self, request: Request) -> tuple[int, Run]:
        number = request.path_params["run"]
        if not 0 <= number < len(self._runs):
            raise HTTPException(404, f"there is no run {number}")
        self._runs[number].refresh()
        return number, self._runs[number]

    def _list(self, request: Request) -> Any:
        for run in self._runs:
            run.refresh()
        acts = self._scale is not None
        return [
            {"id": i, "acts": acts, **run.summary(), "settings": run.settings()} for i, run in enumerate(self._runs)
        ]

    def _series(self, request: Request) -> Any:
        _, run = self._run(request)
        names = _names(request)
        with run.lock:
            table = downsample(run.metrics.table(names))
            known = sorted(run.metrics.names & set(names))
            return {"generation": run.generation, "cursor": run.metrics.cursor, "known": known, **table.json()}

    def _staleness(self, request: Request) -> Any:
        _, run = self._run(request)
        digests, waiting = run.rollouts.digests(DIGEST_S)
        return {**staleness_map(digests), "waiting": waiting, "recorded": len(run.rollouts.files)}

    def _histogram(self, request: Request) -> Any:
        _, run = self._run(request)
        steps = run.rollouts.steps
        first, last = (steps[0], steps[-1]) if steps else (0, 0)
        start, stop = _integer(request, "from", first), _integer(request, "to", last)
        return {"from": start, "to": stop, "first": first, "last": last, **histogram(run.rollouts, start, stop)}

    def _timeline(self, request: Request) -> Any:
        _, run = self._run(request)
        with run.lock:
            return run.timeline.window(_number(request, "from"), _number(request, "to"))

    def _responses(self, request: Request) -> Any:
        _, run = self._run(request)
        steps = run.rollouts.steps
        if not steps:
            return {"steps": [], "responses": [], "total": 0}
        asked = _integer(request, "step", steps[-1])
        step = min(steps, key=lambda s: (abs(s - asked), s))
        sort = request.query_params.get("sort", "recorded")
        if sort not in SORTS:
            raise HTTPException(400, f"sort must be one of {', '.join(SORTS)}")
        offset = max(0, _integer(request, "offset", 0))
        with _recorded(step):
            return {"steps": steps, **responses(run.rollouts.table(step), step, sort, offset)}

    def _response(self, request: Request) -> Any:
        number, run = self._run(request)
        step, row = _integer(request, "step", -1), _integer(request, "row", -1)
        with _recorded(step, row):
            return response(run.rollouts.table(step), step, row, self._decoders[number])

    async def _workers(self, request: Request) -> Response:
        """Ask for so many workers by role, `{"rollout": 3}`; the run's own answer where it refuses."""
        self._run(request)
        if self._scale is None:
            raise HTTPException(403, "this dashboard only reads: the run was started elsewhere")
        try:
            asked = await request.json()
        except ValueError:
            raise HTTPException(400, "expected JSON") from None
        known = isinstance(asked, dict) and asked.keys() <= {"rollout", "reward"}
        if not known or not all(type(count) is int for count in asked.values()):
            raise HTTPException(400, "expected whole numbers for rollout, reward, or both")
        try:
            await run_in_threadpool(self._scale, asked)
        except RlsysError as error:
            raise HTTPException(409, str(error)) from None
        return _json(asked)

    async def _stream(self, request: Request) -> Response:
        """Server-sent events: new rows of the named metrics, and a summary whenever something changed."""
        try:
            numbers = [int(part) for part in request.query_params.get("runs", "0").split(",")]
            after = [tuple(map(int, mark.split("."))) for mark in _marks(request)]
        except ValueError:
            raise HTTPException(400, "runs and after must be whole numbers") from None
        if any(not 0 <= number < len(self._runs) for number in numbers):
            raise HTTPException(404, "there is no such run")
        watched = [Watched(self._runs[n], n, _names(request), mark) for n, mark in _paired(numbers, after)]
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(watched), media_type="text/event-stream", headers=headers)

    async def _events(self, watched: Sequence["Watched"]) -> AsyncIterator[str]:
        yield "retry: 2000\n\n"
        quiet = 0
        while not self._stopping.is_set():
            messages = [m for one in watched for m in await run_in_threadpool(one.news)]
            if messages:
                mark = ",".join(one.mark for one in watched)
                yield "".join(f"id: {mark}\nevent: {kind}\ndata: {as_json(data)}\n\n" for kind, data in messages)
            quiet = 0 if messages else quiet + 1
            if quiet >= HEARTBEAT:
                quiet = 0
                yield ": still here\n\n"
            await asyncio.sleep(LOOK_S)
        yield "event: closing\ndata: {}\n\n"


class Watched:
    """One run as one watcher has seen it."""

    def __init__(self, run: Run, number: int, names: Sequence[str], after: Sequence[int]) -> None:
        self._run, self._number, self._names = run, number, names
        self._generation, self._cursor = after if len(after) == 2 else (run.generation, 0)
        self._told: dict[str, Any] = {}

    @property
    def mark(self) -> str:
        """Where to go on after a lost connection."""
        return f"{self._generation}.{self._cursor}"

    def news(self) -> list[tuple[str, Any]]:
        """What happened since the last call: events of the kinds rows, reset and summary."""
        run, messages = self._run, list[tuple[str, Any]]()
        run.refresh()
        with run.lock:
            if run.generation != self._generation:
                self._generation, self._cursor = run.generation, run.metrics.cursor
                messages.append(("reset", {"run": self._number}))
            elif run.metrics.cursor > self._cursor and self._names:
                table = downsample(run.metrics.since(self._cursor, self._names))
                messages.append(("rows", {"run": self._number, **table.json()}))
            self._cursor = run.metrics.cursor
            summary = run.summary()
        lasting = {key: value for key, value in summary.items() if key not in ("now", "elapsed", "written")}
        if lasting != self._told:
            self._told = lasting
            messages.append(("summary", {"id": self._number, **summary, "settings": run.settings()}))
        return messages


@contextmanager
def _recorded(*place: int) -> Iterator[None]:
    """Turns what is not recorded into a 404."""
    try:
        yield
    except (KeyError, IndexError) as error:
        raise HTTPException(404, f"not recorded: {' '.join(map(str, place))}") from error


def make_app(
    directories: Sequence[Path],
    *,
    host: str,
    token: str | None,
    stopping: threading.Event,
    scale: Scale | None = None,
    open_to_read: bool = False,
) -> Starlette:
    """The dashboard of these run directories, guarded for a server bound to `host`.

    `scale` lets it act on the one run that is served; `open_to_read`: only for that the token is demanded.
    """
    pages = Pages([Run(directory) for directory in directories], stopping, scale)
    middleware = [
        Middleware(Guard, host=host, token=token, open_to_read=open_to_read),
        Middleware(GZipMiddleware, minimum_size=2000),
    ]
    return Starlette(routes=pages.routes(), middleware=middleware)


async def _index(request: Request) -> Response:
    return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


def _catalogue(request: Request) -> Any:
    return {m.name: {"unit": m.unit, "meaning": m.meaning} for m in CATALOGUE.values()}


def _json(value: Any) -> Response:
    return Response(as_json(value), media_type="application/json", headers={"cache-control": "no-store"})


def _names(request: Request) -> list[str]:
    names = [name for name in request.query_params.get("names", "").split(",") if name]
    if len(names) > MOST_NAMES:
        raise HTTPException(400, f"at most {MOST_NAMES} metrics at once")
    return names


def _marks(request: Request) -> list[str]:
    """Where a watcher left off: the browser repeats the last event's id when it connects again."""
    given = request.headers.get("last-event-id") or request.query_params.get("after", "")
    return [mark for mark in given.split(",") if mark]


def _paired(numbers: Sequence[int], after: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    marks = list(after) if len(after) == len(numbers) else [()] * len(numbers)
    return list(zip(numbers, marks, strict=True))


def _integer(request: Request, name: str, default: int) -> int:
    try:
        return int(request.query_params.get(name, default))
    except ValueError:
        raise HTTPException(400, f"{name} must be a whole number") from None


def _number(request: Request, name: str) -> float | None:
    given = request.query_params.get(name)
    try:
        value = float(given) if given else None
    except ValueError:
        value = float("nan")
    if value is not None and value - value != 0:
        raise HTTPException(400, f"{name} must be a number")
    return value
