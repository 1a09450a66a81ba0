"""Run one of Megatron's pretraining scripts as it is, on a machine without a GPU: ``pretrain_worker.py SCRIPT FLAG …``.

Puts in place beforehand what Megatron needs there, and nothing else.
"""

import runpy
import sys
from pathlib import Path

from composer_megatron import cpu

cpu.skip_compilation()

from megatron.core.datasets import utils as dataset_utils  # noqa: E402

if __name__ == "__main__":
    cpu.prepare_training()
    dataset_utils.compile_helpers = lambda: None  # the wheel brings them compiled, and no Makefile
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
