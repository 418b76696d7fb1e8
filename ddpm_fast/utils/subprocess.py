"""Worker processes that exchange lines of JSON with the process that started them.

The parent holds a `JsonWorker`. The worker module calls `json_stdio` first, reads requests and
writes messages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

Message = dict[str, Any]
HOME = str(Path(__file__).parents[2])  # the folder that this package is imported from
_TAIL = 4096  # bytes at the end of stderr in which its last line is searched


class WorkerTimeout(RuntimeError):
    """A worker sent no message in time. It may still run: kill it or wait again."""


class WorkerEnded(RuntimeError):
    """A worker process ended before it sent another message.

    Attributes:
        code: The exit code; the negative number of the signal that ended the process.
        last_line: The last line of its stderr, or "".
    """

    def __init__(self, code: int, last_line: str) -> None:
        super().__init__(
            f"the process ended with code {code}{': ' + last_line if last_line else ''}"
        )
        self.code, self.last_line = code, last_line


def module_command(module: str) -> list[str]:
    """The command that runs `python -m module` with this very package, whatever the current folder
    and the installed packages.
    """
    # last in sys.path, so that the folder's other modules hide none of the standard library
    package = f"import sys; sys.path.insert(0, {HOME!r}); import ddpm_fast"
    last = "sys.path.append(sys.path.pop(0))"
    start = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", f"{package}; {last}; {start}"]


def worker_environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with `variables`. From Python 3.11 on, no module is imported from
    the current folder.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", **(variables or {})}


class JsonWorker:
    """A Python process that receives requests as lines of JSON on stdin and sends messages as lines
    of JSON on stdout.

    Every message is an object; lines of stdout that do not begin with "{" are dropped. A worker
    serves one request or many: it should end when its stdin is closed. Leaving the `with` block
    kills a worker that still runs.

    Args:
        module: The module that the worker runs as `__main__`.
        arguments: Its command line, sys.argv[1:].
        environment: Variables set in addition to this process's environment.
        command: Replaces `python -m module` and its arguments.

    Attributes:
        name: The module, or the command's first word.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.name = module
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - a file, since a full pipe would stop the worker
        self._process = subprocess.Popen(
            [*(command or [*module_command(module), *arguments])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            errors="replace",
            env=worker_environment(environment),
        )
        self._messages: Queue[Message | WorkerEnded] = Queue()
        self._ended: WorkerEnded | None = None
        self._reader = threading.Thread(
            target=self._read, name=f"messages of {module}", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None while the worker runs."""
        return self._process.poll()

    def send(self, request: Mapping[str, Any]) -> None:
        """Writes a request. Does not raise if the worker has ended: `receive` reports how."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def finish(self) -> None:
        """Closes the worker's stdin: there are no more requests."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def receive(self, timeout: float | None = None) -> Message:
        """Returns the next message.

        Args:
            timeout: Seconds to wait; None waits without limit.

        Raises:
            WorkerTimeout: No message came in time.
            WorkerEnded: The process ended, and all its messages were received.
        """
        if self._ended is None:
            try:
                message = self._messages.get(timeout=timeout)
            except Empty:
                raise WorkerTimeout(f"no answer for {timeout:g} s") from None
            if not isinstance(message, WorkerEnded):
                return message
            self._ended = message
        raise self._ended

    def request(self, request: Mapping[str, Any], timeout: float | None = None) -> Message:
        """Sends a request and returns the next message. Raises as `receive` does."""
        self.send(request)
        return self.receive(timeout)

    def wait(self, timeout: float | None = None) -> int:
        """Waits until the worker ends and returns its exit code. Raises WorkerTimeout if it does
        not end in time.
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise WorkerTimeout(f"the process did not end within {timeout:g} s") from None

    def close(self, timeout: float = 10.0) -> int:
        """Closes the worker's stdin, waits `timeout` seconds for its end, then kills it. Returns
        the exit code.
        """
        self.finish()
        with suppress(WorkerTimeout):
            self.wait(timeout)
        return self.kill()

    def kill(self) -> int:
        """Kills the worker if it runs, and releases its pipes. Returns the exit code."""
        self._process.kill()
        code = self._process.wait()
        self.finish()
        self._reader.join(timeout=1.0)  # a process that the worker started may keep its stdout open
        self._stderr.close()
        return code

    def __enter__(self) -> JsonWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # a line that is no message, or that a kill has torn
                    if line.startswith("{"):
                        self._messages.put(json.loads(line))
        code, last_line = self._process.wait(), ""
        with suppress(OSError, ValueError):  # `kill` may close the file meanwhile
            last_line = self._last_line()
        self._messages.put(WorkerEnded(code, last_line))

    def _last_line(self) -> str:
        if self._stderr.closed:
            return ""
        file = (
            self._stderr.fileno()
        )  # pread: the worker's children may still write, at an offset that is shared
        end = os.pread(file, _TAIL, max(0, os.fstat(file).st_size - _TAIL))
        lines = end.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def json_stdio() -> tuple[Iterator[Message], Callable[[Mapping[str, Any]], None]]:
    """The worker's side: the requests of its parent, and the function that sends a message.

    From here on stdout goes to stderr, so what libraries print is not taken for a message.
    Processes that the worker starts do not inherit the messages' pipe.
    """
    sys.stdout.flush()
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    return (json.loads(line) for line in sys.stdin), send
