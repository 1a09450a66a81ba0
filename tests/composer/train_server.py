"""Training processes by the fork of one that has imported Megatron, which would take each of them five seconds.

Reads jobs from standard input, a JSON object a line: ``argv`` and ``processes``, ``output`` (a file), ``fault`` (of
`FAULTS`, with its argument). Answers with the list of exit statuses. As under torchrun, the end of one process with
an error ends the others. Started with arguments instead, it is the script of a torchrun: the fault, then ``argv``.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.simplefilter("ignore")

import megatron.training.training  # noqa: E402, F401
import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync  # noqa: E402

from composer_megatron import builder, data, optimizer, streaming, train  # noqa: E402, F401 - imported once, before forking


def die_while_saving(iteration: str) -> None:
    """Kill -9 in the middle of a file of that checkpoint."""
    write = FileSystemWriterAsync.write_preloaded_data

    def write_or_die(transforms, local_proc_idx, write_bucket, *args, **kwargs):
        file = Path(write_bucket[0])
        if file.parent.name == f"iter_{int(iteration):07d}":
            file.write_bytes(b"PK half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(transforms, local_proc_idx, write_bucket, *args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_or_die)


def fail_at_micro_batch(number: str) -> None:
    """An exception in that forward pass."""
    step, calls = data.forward_step, []

    def step_or_fail(*args):
        calls.append(1)
        if len(calls) == int(number):
            raise RuntimeError("out of paper")
        return step(*args)

    data.forward_step = step_or_fail


def read_in_order(_: str) -> None:
    """No fault, but text folders read from the first document to the last, as no run does."""
    from megatron.core.datasets import gpt_dataset

    gpt_dataset._build_document_index = lambda documents, epochs, *_: np.tile(documents, epochs).astype(np.int32)
    gpt_dataset._build_shuffle_index = lambda _, number, *__: np.arange(number, dtype=np.uint32)


FAULTS = {
    "die-while-saving": die_while_saving,
    "fail-at-micro-batch": fail_at_micro_batch,
    "read-in-order": read_in_order,
}


def main(fault: str, argv: list[str]) -> int:
    """One process: the last rank has the fault."""
    torch.set_num_threads(1)
    if fault and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        name, _, argument = fault.partition(":")
        FAULTS[name](argument)
    return train.main(argv)


def start(rank: int, port: int, job: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(job["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "localhost"}
        status = main(job.get("fault", ""), job["argv"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: dict) -> list[int]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = [start(rank, port, job) for rank in range(job["processes"])]
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + 120
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()) or time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
