"""Renders chat templates in a process of its own, under limits of memory and processor time.

`sera_serve.base.chat` starts this file as a script. It imports nothing of ours, so it starts in some 50 ms. Each
message is four bytes of length, big-endian, and so many bytes of JSON. A render that exceeds a limit ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import Any, BinaryIO

import minijinja

_MEMORY_BYTES = 256 << 20
_CPU_SECONDS = 1
# Instructions of a template, and bytes that its operations make, in the library's own measure.
_FUEL = 5_000_000
_MAX_TEMPLATES = 64


class TemplateRefusal(Exception):
    """The template itself refuses the messages, by `raise_exception`."""


def main() -> None:
    """Serve requests until standard input is closed."""
    # The server decides when this process ends. Signals to the whole group must not end it before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A template's output must not reach the standard output.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    renderer = Renderer()
    while (message := read_message(sys.stdin.buffer)) is not None:
        _limit_cpu()
        write_message(output, renderer.answer(message))


class Renderer:
    """Compiles and renders templates. Compiled ones are kept."""

    def __init__(self) -> None:
        """Set the environment up as transformers sets up its own."""
        self._refusal: str | None = None
        self._names: dict[str, str] = {}
        self._environment = minijinja.Environment(
            filters={"tojson": _to_json},
            globals={"raise_exception": self._raise, "strftime_now": _strftime_now},
            fuel=_FUEL,
            auto_escape_callback=lambda name: False,
            trim_blocks=True,
            lstrip_blocks=True,
            debug=False,
        )

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return `{"text"}` or `{"variables"}`.

        Else `{"refused"}` by the template, `{"costly"}` where the fuel did not do, or `{"error"}` of the template.
        """
        self._refusal = None
        source = message["source"]
        try:
            if "context" not in message:
                return {"variables": sorted(self._environment.undeclared_variables_in_str(source))}
            return {"text": self._environment.render_template(self._name(source), **message["context"])}
        except Exception as error:  # noqa: BLE001 - whatever a template does is its own fault
            if self._refusal is not None:
                return {"refused": self._refusal}
            if getattr(error, "kind", None) == "OutOfFuel":
                return {"costly": "it takes more steps than a template may"}
            # The whole text of an error would quote the template.
            return {"error": getattr(error, "message", str(error))[:300]}

    def _name(self, source: str) -> str:
        name = self._names.get(source)
        if name is None:
            if len(self._names) >= _MAX_TEMPLATES:
                self._names.clear()
                self._environment.clear_templates()
            name = str(len(self._names))
            self._environment.add_template(name, source)
            self._names[source] = name
        return name

    def _raise(self, message: Any) -> None:
        self._refusal = str(message)[:300]
        raise TemplateRefusal


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message; None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    body = stream.read(struct.unpack(">I", head)[0])
    message: dict[str, Any] = json.loads(body)
    return message


def write_message(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write one message."""
    body = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def _limit_cpu() -> None:
    """Allow the next render so many seconds of the processor. The system rounds them up to a second."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + _CPU_SECONDS, hard))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # As transformers' filter: characters of HTML stay as they are.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=None if separators is None else tuple(separators),
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


if __name__ == "__main__":
    main()
