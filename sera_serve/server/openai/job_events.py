"""Events of a training job: as objects, and as a stream that ends with the job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import Scope

from sera_serve.errors import EngineUnavailable, InvalidRequest
from sera_serve.jobs import JobEvent
from sera_serve.server.auth import Caller
from sera_serve.server.errors import describe, note_code
from sera_serve.server.openai.fine_tuning_schemas import JobEventObject
from sera_serve.server.sse import DONE, EventResponse, encode_event
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


class JobEventStream(EventResponse):
    """Server-sent events: each event of a job once, then `[DONE]`. A refusal is an ordinary error."""

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
        super().__init__()
        self._job_id = job_id
        self._caller = caller
        self._tenant = caller.seen_tenant
        self._seq = after or 0
        self._jobs = training.jobs
        self._streams = training.streams
        self._executor = executor

    async def events(self, scope: Scope) -> AsyncGenerator[bytes]:
        """Yield the events until the job has finished."""
        with self._streams.take(self._tenant):
            # Before the status is sent: the job may not be the caller's.
            content, has_more, is_finished = await self._executor.run_in_turn(self._tenant, self._next)
            silent = 0
            try:
                while has_more or not is_finished:
                    yield content
                    silent = 0 if content else silent
                    if not has_more:
                        await asyncio.sleep(_LOOK_S)
                    if scope["app"].state.draining:
                        raise EngineUnavailable("the server is stopping; read the events when it is back")
                    self._caller.check_still_accepted()
                    content, has_more, is_finished = await self._executor.run_in_turn(self._tenant, self._next)
                    silent += 1
                    if not content and silent >= _COMMENT_AFTER:
                        content = _COMMENT
                content += DONE
            except Exception as error:  # noqa: BLE001 - the status 200 is sent already: the error becomes an event
                failure = describe(error, scope["state"]["request_id"])[1]
                note_code(scope, failure["error"]["code"])
                content = encode_event(failure)
            self._ended = True
            yield content

    def _next(self) -> tuple[bytes, bool, bool]:
        """The events since the last call, whether there are more already, and whether the job has finished. Blocks."""
        # The status first: the events of a job's end are written with it.
        is_finished = self._jobs.get(self._job_id, self._tenant).is_finished
        events, has_more = self._jobs.events(self._job_id, self._tenant, self._seq, _AT_ONCE, oldest_first=True)
        if events:
            self._seq = events[-1].seq
        content = b"".join(encode_event(event_object(event).model_dump()) for event in events)
        return content, has_more, is_finished
