"""The page at `/` and the state that it shows."""

import time
from collections import deque
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from getp.serve.app import Service
from getp.serve.batches import Batches

_PAGE = Path(__file__).with_name("page.html")
_INTERVAL_S, _WINDOW_S = 2.0, 300.0
_RATE_S = 60.0  # in which finished requests are counted for the time that is left
_MAX_BATCHES = 50  # on the page, the newest
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
_POLICY += "connect-src 'self'; img-src data:; form-action 'none'; frame-ancestors 'none'"


class Status:
    """The last minutes of a server."""

    def __init__(self, service: Service, batches: Batches | None) -> None:
        self._service, self._batches = service, batches
        self._started = time.monotonic()
        self._tokens, self._sampled = 0, self._started
        # Seconds since the start, tokens per second, batch, share of the KV cache, waiting.
        self._history: deque[tuple[float, float, int, float, int]] = deque(
            maxlen=int(_WINDOW_S / _INTERVAL_S)
        )
        self._finished: dict[str, deque[tuple[float, int]]] = {}  # by batch: time, requests done

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route("/", self._page), Route("/status", self._status)]

    def tick(self) -> None:
        """Note the state, if the last note is old enough."""
        now = time.monotonic()
        if now - self._sampled < _INTERVAL_S:
            return
        stats, seconds = self._service.thread.stats(), now - self._sampled
        rate = (stats.generated_tokens - self._tokens) / seconds
        used = stats.used_kv_blocks / max(stats.kv_blocks, 1)
        waiting = max(stats.waiting, self._service.thread.queued)
        row = now - self._started, round(rate, 1), stats.running, round(used, 4), waiting
        self._history.append(row)
        self._tokens, self._sampled = stats.generated_tokens, now
        self._note_batches(now)

    def _note_batches(self, now: float) -> None:
        running = [] if self._batches is None else self._batches.all()
        runs = {batch.id: batch.run for batch in running if batch.run is not None}
        self._finished = {name: self._finished.get(name, deque()) for name in runs}
        for name, run in runs.items():
            notes = self._finished[name]
            notes.append((now, 0 if run is None else run.journal.done))
            while now - notes[0][0] > _RATE_S:
                notes.popleft()

    async def _page(self, request: Request) -> Response:
        headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
        return Response(_PAGE.read_bytes(), media_type="text/html", headers=headers)

    async def _status(self, request: Request) -> Response:
        engine = self._service.thread.engine
        return JSONResponse(
            {
                "model": self._service.config.model_name,
                "device": engine.device.type,
                "chat": self._service.tokenizer.template is not None,
                "max_positions": engine.max_positions,
                "max_batch_size": engine.max_running,
                "uptime_s": round(time.monotonic() - self._started, 1),
                "window_s": _WINDOW_S,
                "history": list(self._history),
                "batches": self._batch_rows(),
            }
        )

    def _batch_rows(self) -> list[dict[str, Any]]:
        batches = [] if self._batches is None else self._batches.all()[:_MAX_BATCHES]
        rows = []
        for batch in batches:
            record = batch.as_json()
            name = self._batches.files.name(record["input_file_id"]) if self._batches else ""
            rows.append(
                {
                    "id": batch.id,
                    "status": batch.status,
                    "file": name,
                    "left_s": self._seconds_left(batch.id, record["request_counts"]),
                    **record["request_counts"],
                }
            )
        return rows

    def _seconds_left(self, batch_id: str, counts: dict[str, int]) -> float | None:
        """Return the time left at the speed of the last minute; None if it is not known."""
        notes = self._finished.get(batch_id)
        if not notes or notes[-1][1] == notes[0][1]:
            return None
        rate = (notes[-1][1] - notes[0][1]) / (notes[-1][0] - notes[0][0])
        return round((counts["total"] - notes[-1][1]) / rate, 1)
