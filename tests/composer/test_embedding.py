"""The embedding that adds to the gradient buffer: the same sums as Megatron's, over several micro-batches."""

import dataclasses

import pytest
import torch

from composer_megatron.architecture import Architecture
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

pytest.importorskip("megatron.core", reason="needs the extra [train]")
torch.set_num_threads(1)


def gradients(
    *, tied: bool, fused: bool, loss: str = "cross_entropy", overlap: bool = False
) -> dict[str, torch.Tensor]:
    """Of all parameters, added up in Megatron's buffers over three micro-batches, in which tokens occur repeatedly."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from composer_megatron import cpu
    from composer_megatron.backend import get_backend
    from composer_megatron.model import build_model

    cpu.prepare_training()
    shape = dataclasses.replace(PRESETS["tiny"], vocab_size=48, hidden_size=32, head_dim=8, tied_embeddings=tied)
    architecture = Architecture(CompositeSequence.parse("1A1M"), shape)
    parts = ({"loss": "linear"} if loss == "linear" else {}) | ({} if fused else {"embedding": "local"})
    model = build_model(architecture, max_sequence_length=8, backend="composer", parts=parts)
    model.config.gradient_accumulation_fusion = True
    for module in model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True
    get_backend("composer").install()
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=5000)
    parallel = DistributedDataParallel(model.config, settings, model).train()
    parallel.zero_grad_buffer()
    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        tokens = torch.randint(12, (2, 9), generator=generator)
        positions = torch.arange(8).expand(2, -1)
        labels = tokens[:, 1:].contiguous()

        def run(tokens=tokens, positions=positions, labels=labels) -> None:
            parallel(tokens[:, :-1], positions, None, labels=labels).mean().backward()

        if number < 2:
            with parallel.no_sync():
                run()
        else:
            run()
    parallel.finish_grad_sync()
    assert all(parameter.grad is None for parameter in model.parameters())
    return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("loss", "overlap"), [("cross_entropy", False), ("linear", False), ("cross_entropy", True)])
def test_buffers_hold_the_same_sums(tied: bool, loss: str, overlap: bool) -> None:
    wanted = gradients(tied=tied, fused=False, loss=loss, overlap=overlap)
    got = gradients(tied=tied, fused=True, loss=loss, overlap=overlap)
    assert list(got) == list(wanted)
    assert wanted["embedding.word_embeddings.weight"].abs().sum() > 0
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)  # fp32 sums in another order


def test_without_a_buffer_it_is_megatrons_own() -> None:
    from composer_megatron.layers.embedding import AccumulatingEmbedding, accumulate
    from composer_megatron.model import build_model

    architecture = Architecture(CompositeSequence.parse("1A1M"), dataclasses.replace(PRESETS["tiny"], vocab_size=48))
    model = build_model(architecture, max_sequence_length=8, backend="local")
    embedding = model.embedding.word_embeddings
    tokens = torch.randint(48, (2, 8))
    before = embedding(tokens)
    accumulate(embedding, model.config)
    assert isinstance(embedding, AccumulatingEmbedding)
    after = embedding(tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    after.sum().backward()
    counts = torch.bincount(tokens.flatten(), minlength=48).float()
    torch.testing.assert_close(embedding.weight.grad, counts[:, None].expand_as(embedding.weight))
