"""How weights are first drawn: each from the seed and the parameter's name alone.

So every parallel layout starts from the same numbers.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from composer_megatron.errors import UsageError

Draw = Callable[[Tensor], object]
"""Fills a tensor."""


def initialize_weights(model: HybridModel, seed: int) -> None:
    """Draw the weights of a model, or of one rank's part of it, by the configuration's initialisers.

    Each whole matrix is drawn from its own generator, seeded with `seed` and the parameter's name in the whole model,
    and cut to the rank's part. So the parallel layout changes no weight; the kind of device does.

    Raises:
        UsageError: If the model has a parameter for which there is no rule.
    """
    groups = model.pg_collection
    for local_name, parameter in model.named_parameters():
        name = _global_name(model, local_name)
        draw = _initializer(name, model.config)
        group = groups.expt_tp if ".local_experts." in name else groups.tp
        with torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else []), torch.no_grad():
            torch.manual_seed(_seed(seed, name))
            parameter.copy_(_draw_part(parameter, draw, group.rank(), group.size()))


def _draw_part(parameter: nn.Parameter, draw: Draw, rank: int, ranks: int) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        ranks = 1
    dim = max(0, getattr(parameter, "partition_dim", 0))  # -1 where the matrix is not split
    size = list(parameter.shape)
    size[dim] *= ranks
    whole = torch.empty(size, dtype=torch.float32, device=parameter.device)
    draw(whole)
    # Several matrices in one: a rank holds a slice of each. Gate and up are two equal ones, by their stride.
    strides = getattr(parameter, "partition_stride", 1)
    own = getattr(parameter, "partition_sizes", None) or [parameter.shape[dim] // strides] * strides
    kinds = whole.split([length * ranks for length in own], dim)
    return torch.cat([kind.chunk(ranks, dim)[rank % ranks] for kind in kinds], dim)


def _initializer(name: str, config: TransformerConfig) -> Draw:
    rules: tuple[tuple[str, Draw], ...] = (
        ("norm.weight", nn.init.ones_),
        (".bias", nn.init.zeros_),
        ("embeddings.weight", config.embedding_init_method),
        ("output_layer.weight", config.init_method),
        ("linear_qkv.weight", config.init_method),
        ("linear_fc1.weight", config.init_method),
        ("eh_proj.weight", config.init_method),
        ("linear_proj.weight", config.output_layer_init_method),
        ("linear_fc2.weight", config.output_layer_init_method),
        ("router.weight", config.init_method),
        *((f"linear_{kind}_proj.weight", config.init_method) for kind in ("q", "q_down", "q_up", "kv_down", "kv_up")),
        ("in_proj.weight", config.init_method),
        ("out_proj.weight", config.output_layer_init_method),
        ("conv1d_weight", _convolution),
        ("conv1d_bias", _convolution),
        ("conv1d.weight", _convolution),
        (".A_log", _decay),
        (".D", nn.init.ones_),
        ("mixer.dt_bias", _step),
        ("self_attention.dt_bias", nn.init.ones_),
    )
    for ending, draw in rules:
        if name.endswith(ending):
            return draw
    raise UsageError(f"no initialiser for parameter {name!r}; known endings: {', '.join(e for e, _ in rules)}")


def _convolution(tensor: Tensor) -> None:
    """PyTorch's default for a convolution of one channel over four tokens, which Megatron-core keeps."""
    tensor.uniform_(-0.5, 0.5)


def _decay(tensor: Tensor) -> None:
    """The logarithm of U(1, 16), as Mamba-2 and Gated DeltaNet have it."""
    tensor.uniform_(1, 16).log_()


def _step(tensor: Tensor) -> None:
    """What softplus makes a step size of that is log-uniform in (0.001, 0.1), as Mamba-2 has it."""
    tensor.uniform_(math.log(0.001), math.log(0.1)).exp_()
    tensor.add_(torch.log(-torch.expm1(-tensor)))


def _global_name(model: HybridModel, name: str) -> str:
    """The parameter's name in a model of one rank: blocks and experts counted from the first, tied copies as one."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    prefix, experts = "decoder.layers.", ".local_experts."
    if name.startswith(prefix):
        index, _, rest = name.removeprefix(prefix).partition(".")
        name = f"{prefix}{model.decoder.layers[int(index)].layer_number - 1}.{rest}"
    if experts in name:
        before, _, after = name.partition(experts)
        index, _, rest = after.partition(".")
        group = model.pg_collection.ep
        first = group.rank() * (model.config.num_moe_experts // group.size())
        name = f"{before}{experts}{first + int(index)}.{rest}"
    return name


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
