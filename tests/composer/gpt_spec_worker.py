"""One micro-batched step of GPTModel in several layouts; started by torchrun with two processes.

Arguments: a folder with ``weights.pt`` (a HybridModel's, by name) and ``tokens.pt`` (micro-batches, batch, tokens), and
a JSON list of layouts. Writes the losses and the gradients of each rank: by the HybridModel's names, which elements of
the whole it has, and their gradients.
"""

import json
import sys
from pathlib import Path

from composer_megatron import cpu

cpu.skip_compilation()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig  # noqa: E402

from composer_megatron.architecture import Architecture  # noqa: E402


def model_config(architecture: Architecture, **layout) -> GPTModelConfig:
    """Megatron's configuration for GPTModel, as `gpt_config_from_args` makes it of the flags."""
    shape = architecture.shape
    transformer = TransformerConfig(
        num_layers=len(architecture.sequence),
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        finalize_model_grads_func=finalize_model_grads,
        deallocate_pipeline_outputs=True,
        **layout,
    )
    return GPTModelConfig(
        transformer=transformer,
        vocab_size=shape.vocab_size,
        seq_length=64,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )


def hybrid_name(stage, name: str) -> str:
    """What the parameter is called in a HybridModel of one stage."""
    if name == "output_layer.weight" and stage.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    if name.startswith("decoder.layers."):
        _, _, index, rest = name.split(".", 3)
        return f"decoder.layers.{stage.decoder.layers[int(index)].layer_number - 1}.{rest}"
    return name.replace("final_layernorm", "final_norm")


def part(whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This tensor-parallel rank's part of a matrix; gate and up are cut one by one."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    halves = whole.chunk(parameter.partition_stride, parameter.partition_dim)
    return torch.cat([half.chunk(ranks, parameter.partition_dim)[rank] for half in halves], parameter.partition_dim)


def step(folder: Path, number: int, layout: dict) -> None:
    virtual = layout.get("virtual_pipeline_model_parallel_size")
    parallel_state.initialize_model_parallel(
        layout.get("tensor_model_parallel_size", 1), layout.get("pipeline_model_parallel_size", 1), virtual
    )
    model_parallel_cuda_manual_seed(1)
    from composer_megatron.gpt_spec import gpt_spec

    config = model_config(Architecture.load(folder / "architecture.json"), **layout)
    config.transformer_layer_spec = gpt_spec
    groups = ProcessGroupCollection.use_mpu_process_groups()
    vp_stages = [None] if virtual is None else range(virtual)
    stages = [GPTModelBuilder(config).build_model(groups, vp_stage=vp_stage) for vp_stage in vp_stages]
    weights = torch.load(folder / "weights.pt")
    with torch.no_grad():
        for stage in stages:
            for name, parameter in stage.named_parameters():
                parameter.copy_(part(weights[hybrid_name(stage, name)], parameter))
    chunks = [
        DistributedDataParallel(config.transformer, DistributedDataParallelConfig(), stage, disable_bucketing=index > 0)
        for index, stage in enumerate(stages)
    ]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    tokens = torch.load(folder / "tokens.pt")
    losses = run_schedule(chunks, tokens)
    gradients = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            whole = weights[hybrid_name(stage, name)]
            places = part(torch.arange(whole.numel()).view_as(whole), parameter)
            gradients[hybrid_name(stage, name)] = (places, parameter.main_grad.clone())
    torch.save({"losses": losses, "gradients": gradients}, folder / f"step-{number}-{torch.distributed.get_rank()}.pt")
    parallel_state.destroy_model_parallel()


def run_schedule(chunks: list, tokens: torch.Tensor) -> list[float]:
    """Forward and backward of all micro-batches; the losses, on the last stage."""

    def forward_step(batches, model):
        batch = next(batches)
        positions = torch.arange(batch.shape[1] - 1).expand(batch.shape[0], -1)
        output = model(batch[:, :-1], positions, None, labels=batch[:, 1:].contiguous())
        return output, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})

    batches = [iter(tokens) for _ in chunks]
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(tokens),
        seq_length=tokens.shape[-1] - 1,
        micro_batch_size=tokens.shape[1],
        forward_only=False,
    )
    return [float(result["loss"]) for result in results]


if __name__ == "__main__":
    cpu.prepare_training()
    torch.distributed.init_process_group("gloo")
    for index, asked in enumerate(json.loads(sys.argv[2])):
        step(Path(sys.argv[1]), index, asked)
    torch.distributed.destroy_process_group()
