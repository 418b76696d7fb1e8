"""Worker process of one engine: `python -m ddpm_fast.benchmark.worker ENGINE SETTING`.

The setting is in JSON. Requests and answers are lines of JSON (`utils.subprocess.JsonWorker`). The
first answer has the engine's name; an engine that fails answers {"failed": reason, "cause": ...}
and ends.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from ..utils.numerics import full_fp32
from ..utils.subprocess import json_stdio
from .engines import EngineFailed, LocalEngine, failures
from .workload import Setting, indexed


def main() -> None:
    name, text = sys.argv[1:]
    requests, send = json_stdio()
    sys.path.append(os.getcwd())  # the user's modules, for engines named `package.module:Class`
    setting = Setting(**json.loads(text))
    torch.set_num_threads(setting.threads)
    if torch.device(setting.device).type == "cuda":
        torch.cuda.set_device(indexed(setting.device))
    try:
        with full_fp32(), failures():
            engine = LocalEngine(name, setting.workload())
            send(dict(name=engine.name, reason=engine.reason))
            for request in requests:
                send(engine.request(**request))
    except EngineFailed as error:
        send(dict(failed=str(error), cause=error.cause.value))


if __name__ == "__main__":
    main()
