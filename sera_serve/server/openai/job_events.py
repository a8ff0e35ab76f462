"""Events of a training job: as objects, and as a stream that ends with the job."""

from __future__ import annotations

import asyncio

from fastapi import Response
from starlette.types import Receive, Scope, Send

from sera_serve.errors import EngineUnavailable, InvalidRequest
from sera_serve.jobs import JobEvent
from sera_serve.server.auth import Caller
from sera_serve.server.disconnect import ClientDisconnected, cancel_on_disconnect
from sera_serve.server.errors import CLIENT_CLOSED_CODE, describe, note_code
from sera_serve.server.openai.fine_tuning_schemas import JobEventObject
from sera_serve.server.sse import DONE, encode_event
from sera_serve.server.training import Training
from sera_serve.threads import BoundedExecutor

EVENT_PREFIX, CHECKPOINT_PREFIX = "ftevent-", "ftckpt-"
_AT_ONCE = 100
_LOOK_S = 0.5
# Proxies end a connection that is silent for a minute.
_COMMENT_AFTER = 30
_COMMENT = b": the job has no news\n\n"


def event_object(event: JobEvent) -> JobEventObject:
    """An event as clients read it."""
    return JobEventObject(
        id=f"{EVENT_PREFIX}{event.seq}",
        created_at=int(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )


def number_after(after: str | None, prefix: str, item: str) -> int | None:
    """The number in the id that a page begins after; raises InvalidRequest for another text than the id of `item`."""
    if after is None:
        return None
    digits = after.removeprefix(prefix)
    if digits == after or not digits.isdecimal() or not digits.isascii() or len(digits) > 9:
        raise InvalidRequest(f"after is {after!r}; send the id of {item}", param="after")
    return int(digits)


class JobEventStream(Response):
    """Server-sent events: each event of a job once, then `[DONE]`. A refusal is an ordinary error."""

    media_type = "text/event-stream"

    def __init__(
        self, job_id: str, caller: Caller, after: int | None, training: Training, executor: BoundedExecutor
    ) -> None:
        """Prepare the response.

        Args:
            job_id: The job.
            caller: Who sent the request. The stream ends with an error when the caller's key is accepted no more.
            after: The number of the last event that the client has, or None.
            training: Has the jobs.
            executor: Reads the database.
        """
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job_id = job_id
        self._caller = caller
        self._tenant = caller.seen_tenant
        self._seq = after or 0
        self._jobs = training.jobs
        self._streams = training.streams
        self._executor = executor
        self._started = False
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the job has finished, or the client disconnects."""
        try:
            with self._streams.take(self._tenant):
                await cancel_on_disconnect(receive, self._send_events(send, scope))
        except ClientDisconnected:
            if not self._started:
                raise
            # A server tells of a disconnect at the end of each response too.
            if not self._ended:
                note_code(scope, CLIENT_CLOSED_CODE)

    async def _send_events(self, send: Send, scope: Scope) -> None:
        # Before the status is sent: the job may not be the caller's.
        content, is_finished = await self._executor.run(self._next)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._started = True
        silent = 0
        try:
            while not is_finished:
                if content:
                    await send({"type": "http.response.body", "body": content, "more_body": True})
                    silent = 0
                await asyncio.sleep(_LOOK_S)
                if scope["app"].state.draining:
                    raise EngineUnavailable("the server is stopping; read the events when it is back")
                self._caller.check_still_accepted()
                content, is_finished = await self._executor.run(self._next)
                silent += 1
                if not content and silent >= _COMMENT_AFTER:
                    content = _COMMENT
            content += DONE
        except Exception as error:  # noqa: BLE001 - the status 200 is sent already: the error becomes an event
            failure = describe(error, scope["state"]["request_id"])[1]
            note_code(scope, failure["error"]["code"])
            content = encode_event(failure)
        self._ended = True
        await send({"type": "http.response.body", "body": content, "more_body": False})

    def _next(self) -> tuple[bytes, bool]:
        """The events since the last call, and whether no more will come. Blocks."""
        # The status first: the events of a job's end are written with it.
        is_finished = self._jobs.get(self._job_id, self._tenant).is_finished
        events, has_more = self._jobs.events(self._job_id, self._tenant, self._seq, _AT_ONCE, oldest_first=True)
        if events:
            self._seq = events[-1].seq
        content = b"".join(encode_event(event_object(event).model_dump()) for event in events)
        return content, is_finished and not has_more
