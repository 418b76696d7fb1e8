"""Worker processes that exchange lines of JSON with their parent process.

The parent uses `JsonWorker`; the worker module calls `json_stdio` first.
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
HOME = str(Path(__file__).parents[2])  # the folder that contains this package
_TAIL = 4096  # bytes at the end of stderr that are searched for its last line


class WorkerTimeout(RuntimeError):
    """A worker sent no message in time. It may still be running: kill it or wait again."""


class WorkerEnded(RuntimeError):
    """A worker process ended before it sent another message.

    Attributes:
        code: Exit code; negative: the number of the signal that ended the process.
        last_line: Last line of its stderr, or "".
    """

    def __init__(self, code: int, last_line: str) -> None:
        super().__init__(
            f"the process ended with code {code}{': ' + last_line if last_line else ''}"
        )
        self.code, self.last_line = code, last_line


def module_command(module: str) -> list[str]:
    """Returns the command of `python -m module` with this package.

    It does not depend on the current directory or on installed versions of the package.
    """
    # last in sys.path, so that other modules of the folder do not shadow the standard library
    package = f"import sys; sys.path.insert(0, {HOME!r}); import ddpm_fast"
    last = "sys.path.append(sys.path.pop(0))"
    start = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", f"{package}; {last}; {start}"]


def worker_environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns this process's environment with `variables` added.

    From Python 3.11, the worker imports no module from the current directory.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", **(variables or {})}


class JsonWorker:
    """Python process with requests on stdin and messages on stdout, as lines of JSON.

    A message is an object; lines of stdout that do not start with "{" are ignored. The worker
    serves requests until its stdin is closed. Leaving the `with` block kills a running worker.

    Args:
        module: Module that the worker runs as `__main__`.
        arguments: Its command line, sys.argv[1:].
        environment: Variables added to this process's environment.
        command: Replaces `python -m module` and its arguments.

    Attributes:
        name: The module.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.name = module
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - a full pipe would block the worker
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
        """Exit code; None while the worker runs."""
        return self._process.poll()

    def send(self, request: Mapping[str, Any]) -> None:
        """Sends a request. If the worker has ended, `receive` raises, not `send`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def finish(self) -> None:
        """Closes the worker's stdin: no more requests follow."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def receive(self, timeout: float | None = None) -> Message:
        """Returns the next message.

        Args:
            timeout: Seconds to wait; None: no limit.

        Raises:
            WorkerTimeout: There was no message in time.
            WorkerEnded: The process has ended, and all its messages have been received.
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
        """Waits for the end of the worker and returns its exit code.

        Raises:
            WorkerTimeout: The worker did not end in time.
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise WorkerTimeout(f"the process did not end within {timeout:g} s") from None

    def close(self, timeout: float = 10.0) -> int:
        """Closes the worker's stdin, waits up to `timeout` seconds, and kills it.

        Returns:
            The exit code.
        """
        self.finish()
        with suppress(WorkerTimeout):
            self.wait(timeout)
        return self.kill()

    def kill(self) -> int:
        """Kills the worker if it is running, closes its pipes and returns the exit code."""
        self._process.kill()
        code = self._process.wait()
        self.finish()
        self._reader.join(timeout=1.0)  # a child of the worker may keep stdout open
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
                with suppress(ValueError):  # not a message, or truncated by a kill
                    if line.startswith("{"):
                        self._messages.put(json.loads(line))
        code, last_line = self._process.wait(), ""
        with suppress(OSError, ValueError):  # `kill` may close the file concurrently
            last_line = self._last_line()
        self._messages.put(WorkerEnded(code, last_line))

    def _last_line(self) -> str:
        if self._stderr.closed:
            return ""
        file = self._stderr.fileno()  # pread: the file offset is shared with children that write
        end = os.pread(file, _TAIL, max(0, os.fstat(file).st_size - _TAIL))
        lines = end.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def json_stdio() -> tuple[Iterator[Message], Callable[[Mapping[str, Any]], None]]:
    """Returns, in the worker, an iterator over requests and a function that sends a message.

    It redirects stdout to stderr, so output of libraries is not mistaken for messages. Child
    processes do not inherit the pipe of the messages.
    """
    sys.stdout.flush()
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    return (json.loads(line) for line in sys.stdin), send
