"""Save freshly drawn models as training runs, in several parallel layouts; started by torchrun with two processes.

The argument is a JSON list of jobs: ``folder`` (with an architecture file in it), ``iteration``, ``pattern`` (cut into
as many stages as there are pipeline ranks), ``tensor_parallel``, ``dtype``, ``flags``.
"""

import argparse
import json
import sys
from pathlib import Path

from composer_megatron import cpu

cpu.skip_compilation()

import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.model import build_model  # noqa: E402


def save(job: dict) -> None:
    folder, pattern = Path(job["folder"]), job["pattern"]
    stages = pattern.count("|") + 1
    parallel_state.initialize_model_parallel(job["tensor_parallel"], stages)
    model = build_model(
        Architecture.load(folder / "architecture.json"),
        max_sequence_length=job["flags"].get("seq_length", 1),
        dtype=getattr(torch, job["dtype"]),
        pattern=pattern,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    checkpoint = folder / "checkpoints" / f"iter_{job['iteration']:07d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = {"model": model.sharded_state_dict(), "iteration": job["iteration"]}
    if job["flags"]:
        state["args"] = argparse.Namespace(**job["flags"])
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(checkpoint))
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(job["iteration"]))
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    cpu.prepare_training()
    torch.distributed.init_process_group("gloo")
    for job in json.loads(sys.argv[1]):
        save(job)
    torch.distributed.destroy_process_group()
