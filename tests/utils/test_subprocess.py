"""Worker processes: messages, timeouts, crashes and kills."""

import os
import subprocess
import sys
import time

import pytest

from ddpm_fast.utils.subprocess import (
    JsonWorker,
    WorkerEnded,
    WorkerTimeout,
    module_command,
    worker_environment,
)

ECHO = """
import os, sys, time
from ddpm_fast.utils.subprocess import json_stdio
requests, send = json_stdio()
print("{not a message}")  # output of a library
os.system("echo '{neither is this}'")
send(dict(hello=sys.argv[1:], variable=os.environ.get("VARIABLE")))
for request in requests:
    if "sleep" in request:
        time.sleep(request["sleep"])
    if "exit" in request:
        sys.exit(request["exit"])
    if "orphan" in request:  # a child that keeps inherited files open
        os.posix_spawn("/bin/sleep", ["sleep", "5"], os.environ)
        os.abort()
    send(request)
"""


def echo(*arguments, **options):
    return JsonWorker("echo", command=[sys.executable, "-c", ECHO, *arguments], **options)


def test_requests_and_messages():
    with echo("a", "b", environment=dict(VARIABLE="here")) as worker:
        assert worker.receive(20) == dict(hello=["a", "b"], variable="here")
        for request in (dict(n=1), dict(text="line\nbreak", values=[1.5, None])):
            assert worker.request(request, 20) == request
        assert worker.exit_code is None
        assert worker.close() == 0 == worker.exit_code
        with pytest.raises(WorkerEnded, match="ended with code 0"):
            worker.receive(20)


def test_a_late_message_can_be_received_after_a_timeout():
    with echo() as worker:
        worker.receive(20)
        with pytest.raises(WorkerTimeout, match=r"no answer for 0\.1 s"):
            worker.request(dict(sleep=0.5), 0.1)
        assert worker.receive(20) == dict(sleep=0.5)


def test_the_end_is_reported_after_the_messages_before_it():
    with echo() as worker:
        worker.send(dict(n=1))
        worker.send(dict(exit="no memory\nfor this"))
        assert "hello" in worker.receive(20) and worker.receive(20) == dict(n=1)
        for _ in range(2):
            with pytest.raises(WorkerEnded, match="ended with code 1: for this") as raised:
                worker.request(dict(n=2), 20)
        assert (raised.value.code, raised.value.last_line) == (1, "for this")


def test_a_crash_is_reported_while_a_child_of_the_worker_runs():
    with echo() as worker:
        worker.receive(20)
        started = time.perf_counter()
        with pytest.raises(WorkerEnded, match="code -6"):
            worker.request(dict(orphan=True), 20)
        assert time.perf_counter() - started < 4


def test_leaving_the_block_kills_a_worker_that_hangs():
    with echo() as worker:
        worker.receive(20)
        worker.send(dict(sleep=1000))
    assert worker.exit_code == -9
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_worker_imports_this_package_and_nothing_in_the_current_directory(monkeypatch, tmp_path):
    """It does not import another installed ddpm_fast either."""
    (tmp_path / "queue.py").write_text("raise SystemExit('the queue of the current directory')")
    (tmp_path / "installed" / "ddpm_fast").mkdir(parents=True)
    (tmp_path / "installed" / "ddpm_fast" / "__init__.py").write_text(
        "raise SystemExit('not this package')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    monkeypatch.chdir(tmp_path)
    command = module_command("ddpm_fast.utils.subprocess")
    done = subprocess.run(command, capture_output=True, text=True, env=worker_environment())
    assert (done.returncode, done.stderr) == (0, "")


def test_a_truncated_message_does_not_hide_the_end():
    code = "import os; os.write(1, b'{\"cut\": '); os.abort()"
    with (
        JsonWorker("truncated", command=[sys.executable, "-c", code]) as worker,
        pytest.raises(WorkerEnded, match="-6"),
    ):
        worker.receive(20)
