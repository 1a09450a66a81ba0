"""What Megatron-LM's ``pretrain_hybrid.py`` and ``pretrain_gpt.py`` do, which the wheel does not bring.

The first argument says which of the two, the others are Megatron's. Everything that reads ``--spec`` is the wheel's.
"""

import sys

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args

from composer_megatron.data import forward_step, train_valid_test_datasets

CONFIGS = {"hybrid": hybrid_config_from_args, "gpt": gpt_config_from_args}

if __name__ == "__main__":
    config_from_args = CONFIGS[sys.argv.pop(1)]
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, config_from_args(args)),
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
