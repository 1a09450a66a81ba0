"""Training steps of a model on one of our backends, as Megatron-core does them, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from composer_megatron import cpu
from composer_megatron.architecture import Architecture


class MegatronTrainer:
    """A model of one of our backends in Megatron-core's data parallelism, with its mixed-precision optimizer.

    What Megatron's training loop does in a step, without its schedules and logs: fp32 gradient buffers, to which the
    backward passes add, clipping by the global norm, AdamW on fp32 masters.
    """

    def __init__(self, architecture: Architecture, backend: str, seq_len: int, dtype: torch.dtype) -> None:
        """Build the model in a group of this one process.

        Args:
            architecture: What to train.
            backend: A name in `composer_megatron.backend.BACKENDS`, perhaps followed by ``+part=player``; with
                TransformerEngine's projections also by ``+fp8=recipe``, a name of Megatron's `--fp8-recipe`.
            seq_len: Longest sequence to come.
            dtype: Of the weights.
        """
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        from composer_megatron.backend import get_backend
        from composer_megatron.model import CompositeModel, initialize_single_process, transformer_config
        from composer_megatron.optimizer import prepare_optimizer
        from composer_megatron.pattern import hybrid_pattern
        from composer_megatron.specs import stack_spec

        cpu.prepare_training()
        initialize_single_process()
        model_parallel_cuda_manual_seed(1)
        name, *parts = backend.split("+")
        chosen = dict(part.split("=", 1) for part in parts)
        recipe = chosen.pop("fp8", None)
        players = get_backend(name, chosen)
        prepare_optimizer(players.optimizer.use)
        players.install()
        shape = architecture.shape
        megatron_loss = players.loss.use == "megatron"
        config = transformer_config(
            architecture,
            dtype=dtype,
            backend=players,
            on_cpu=not cpu.has_gpu(),
            bf16=dtype == torch.bfloat16,
            gradient_accumulation_fusion=players.gradient_accumulation.use.on,
            # Megatron's own fusions, which its training program switches on
            bias_activation_fusion=players.activation.use is None,
            bias_dropout_fusion=True,
            cross_entropy_loss_fusion=megatron_loss,
            cross_entropy_fusion_impl="native",
            **({} if recipe is None else {"fp8": "hybrid", "fp8_recipe": recipe}),
        )
        self._players, self._dtype, self._shape = players, dtype, shape
        self.model = CompositeModel(
            loss=players.loss.use,
            embedding_rows=players.embedding.use,
            config=config,
            hybrid_stack_spec=stack_spec(players),
            vocab_size=shape.vocab_size,
            max_sequence_length=seq_len,
            hybrid_layer_pattern=hybrid_pattern(architecture.sequence),
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
        )
        if cpu.has_gpu():
            self.model.cuda()
        self._draw()
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        self.parallel = DistributedDataParallel(config, settings, self.model).train()
        self.optimizer = self._optimizer(dtype)
        self._positions: dict[tuple[int, int], Tensor] = {}

    @property
    def says(self) -> str:
        """Who plays what, in one line; after a step also what TransformerEngine chose."""
        return self._players.report(self._shape, self._dtype)

    @property
    def attention(self) -> str | None:
        """What TransformerEngine computed attention with in the last step; None before, and where it is not its."""
        from composer_megatron.backend import transformer_engine_attention

        return None if self._players.attends_by_itself() else transformer_engine_attention()

    def _optimizer(self, dtype: torch.dtype) -> Any:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config = OptimizerConfig(
            optimizer="adam",
            lr=1e-5,
            weight_decay=0.1,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
        )
        return get_megatron_optimizer(config, [self.parallel])

    def _inner(self) -> Iterator[Any]:
        for each in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            yield each.optimizer

    @torch.no_grad()
    def _draw(self) -> None:
        for param in self.model.parameters():
            if param.dim() > 1:
                param.normal_(0.0, 0.02)
            else:
                param.fill_(1.0)

    def fill(self) -> None:
        """As `Trainer.fill`."""
        self._draw()
        self.optimizer.reload_model_params()
        for inner in self._inner():
            for state in inner.state.values():
                for value in state.values():
                    if isinstance(value, Tensor) and value.dim():
                        value.zero_()

    def tensors(self) -> Iterator[Tensor]:
        """As `Trainer.tensors`."""
        yield from self.model.parameters()
        yield from (buffer.grad_data for buffer in self.parallel.buffers)
        for inner in self._inner():
            yield from (param for group in inner.param_groups for param in group["params"])
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())

    def step(self, micro_batches: list[Tensor]) -> Tensor:
        """As `Trainer.step`."""
        with torch.profiler.record_function("optimizer"):
            self.parallel.zero_grad_buffer()
            self.optimizer.zero_grad()
        for number, tokens in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else self.parallel.no_sync():
                size = (tokens.shape[0], tokens.shape[1] - 1)
                if size not in self._positions:
                    self._positions[size] = torch.arange(size[1], device=tokens.device).expand(size[0], -1)
                labels = tokens[:, 1:].contiguous()
                losses = self.parallel(tokens[:, :-1].contiguous(), self._positions[size], None, labels=labels)
                loss = losses.float().mean()
                (loss / len(micro_batches)).backward()
        self.parallel.finish_grad_sync()
        with torch.profiler.record_function("optimizer"):
            self.optimizer.step()
        return loss.detach()
