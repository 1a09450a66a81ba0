"""A Composite language model for Hugging Face transformers: attention and MLP blocks in any order.

Needs PyTorch and transformers alone. The order is ``config.sequence``, for example ``2A4M2A4M``: A is a block of
grouped-query attention, W one whose queries see a window of the last tokens alone, M a block of SwiGLU MLP. Each block
is ``x + f(norm(x))``. Attention blocks alone have a decoding cache, that of W never longer than its window; they take
the cache's places in their own order: the first attention block has place 0.
"""

import math
import re
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

KINDS = {"A": "full_attention", "W": "sliding_attention"}
"""What transformers calls the kinds of attention."""


class CompositeConfig(PretrainedConfig):
    """The widths of a Composite model and the order of its blocks.

    Args:
        sequence: Runs of blocks, each a count (1 if left out) and a letter A, W or M: ``2A4M``, ``AAMMMM``.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the MLP.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; a divisor of the query heads.
        head_dim: Width of a head.
        max_position_embeddings: Tokens of a training sequence.
        rope_theta: Base of the rotary embedding.
        rope_scaling: How it is scaled for long texts, ``rope_type`` being ``llama3`` with four numbers; None for not.
        rope_parameters: The same in the words of transformers 5, ``rope_theta`` included.
        rms_norm_eps: Added to the mean square in RMSNorm.
        initializer_range: Standard deviation of fresh weights.
        sliding_window: Tokens that a query of a W block sees, its own included; needed where there is one.
        tie_word_embeddings: Whether the output layer is the embedding.
        use_cache: Whether a forward pass returns a decoding cache.
        kwargs: As for every configuration.
    """

    model_type = "composite"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        *,
        sequence: str = "2A4M",
        vocab_size: int = 32768,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        head_dim: int = 64,
        max_position_embeddings: int = 4096,
        rope_theta: float = 500000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        sliding_window: int | None = None,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if not re.fullmatch(r"(\d*[AWM])+", sequence):
            raise ValueError(f"sequence={sequence!r}; expected counts and the letters A, W and M, such as 2A4M")
        if "W" in sequence and (sliding_window is None or sliding_window < 1):
            raise ValueError(f"sliding_window={sliding_window!r}; {sequence} has W blocks and needs at least 1")
        self.sequence = sequence
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = len(self.blocks)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        rope = rope_parameters or rope_scaling or {}
        if rope.get("rope_type", "default") not in ("default", "llama3"):
            raise ValueError(f"rope_type={rope['rope_type']!r}; expected llama3, or default for no scaling")
        self.rope_theta = rope.get("rope_theta", rope_theta)
        if rope.get("rope_type") == "llama3":
            self.rope_parameters = {**rope, "rope_theta": self.rope_theta}
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        if "W" in sequence:
            # What the cache keeps at each of its places; there is one for each block, and the last ones stay empty.
            attending = [KINDS[letter] for letter in self.blocks if letter != "M"]
            self.sliding_window = sliding_window
            self.layer_types = attending + ["full_attention"] * (len(self.blocks) - len(attending))
        for said_by_sequence in ("num_hidden_layers", "layer_types"):
            kwargs.pop(said_by_sequence, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def blocks(self) -> str:
        """One letter a block: ``AAMMMM`` for ``2A4M``."""
        runs = re.findall(r"(\d*)([AWM])", self.sequence)
        return "".join(letter * int(count or 1) for count, letter in runs)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden_size) to the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_embedding(positions: Tensor, config: CompositeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which the pairs of a head turn, each (batch, 1, tokens, head_dim).

    Component i is paired with component i + head_dim / 2; both turn by position / theta^(2i / head_dim), unless scaled.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if (rope := getattr(config, "rope_parameters", None)) and rope["rope_type"] == "llama3":
        # As it was for pairs that turn often in the original length, slower by the factor for those that do not.
        turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        kept = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        kept = kept.clamp(0, 1)
        frequencies = (1 - kept) * frequencies / rope["factor"] + kept * frequencies
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs of x, (batch, heads, tokens, head_dim)."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def visible_keys(
    queries: int, keys: int, past: int, mask: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each query sees, (batch or 1, 1, queries, keys), true for yes; None where causality alone says it.

    The last of the keys that are filled is the last query's own; a cache that keeps a window has dropped the first
    ones. Keys after that place are not yet filled.

    Args:
        queries: Tokens of this pass.
        keys: Keys that the cache hands out.
        past: Tokens before this pass.
        mask: (batch, past + queries), true for tokens and false for padding; or of four dimensions, which is complete
            as it is: `generate` makes such masks for static caches.
        window: Keys that a query sees, its own included; None for all.
        device: Where the mask is wanted.
    """
    if mask is not None and mask.dim() == 4:
        return mask
    total = past + queries
    all_in_window = window is None or total <= window
    if mask is None and keys == total and all_in_window and (queries == 1 or past == 0):
        return None
    dropped = max(0, total - keys)
    own = torch.arange(past, total, device=device)[:, None]
    places = torch.arange(dropped, dropped + keys, device=device)[None, :]
    seen = places <= own
    if window is not None:
        seen = seen & (places > own - window)
    if mask is None:
        return seen[None, None]
    real = F.pad(mask[:, dropped:].bool(), (0, dropped + keys - mask.shape[1]))
    # A padding token sees itself: softmax over no key at all would be no number.
    return (seen[None, None] & real[:, None, None, :]) | (places == own)[None, None]


def checked_mask(mask: Tensor | None) -> Tensor | None:
    """A mask of two or four dimensions; None where nothing is masked, since attention is faster without one."""
    if mask is not None and mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}; expected (batch, tokens)")
    return None if mask is not None and mask.dim() == 2 and mask.all() else mask


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embedding, over all tokens or over a window of them."""

    def __init__(self, config: CompositeConfig, cache_place: int, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.head_dim = config.head_dim
        self.cache_place = cache_place
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, past_key_values: Cache | None, past: int
    ) -> Tensor:
        """Attend; `x` is (batch, tokens, hidden_size), `past` counts the tokens in the cache."""
        batch, tokens, _ = x.shape
        query, key, value = (
            projection(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.cache_place)
        visible = visible_keys(tokens, key.shape[2], past, mask, self.window, x.device)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=visible is None and tokens > 1, enable_gqa=True
        )
        return self.o_proj(output.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden_size) to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class AttentionBlock(GradientCheckpointingLayer):
    """x + attention(norm(x))."""

    def __init__(self, config: CompositeConfig, cache_place: int, window: int | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, cache_place, window)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None = None,
        past: int = 0,
    ) -> Tensor:
        """As for `Attention`."""
        return x + self.self_attn(self.norm(x), rotation, mask, past_key_values, past)


class MLPBlock(GradientCheckpointingLayer):
    """x + mlp(norm(x))."""

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden_size) to the same shape."""
        return x + self.mlp(self.norm(x))


class CompositePreTrainedModel(PreTrainedModel):
    """What the classes below share."""

    config_class = CompositeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["AttentionBlock", "MLPBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True


class CompositeModel(CompositePreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MLPBlock(config)
            if letter == "M"
            else AttentionBlock(
                config,
                cache_place=index - config.blocks[:index].count("M"),
                window=config.sliding_window if letter == "W" else None,
            )
            for index, letter in enumerate(config.blocks)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens seen so far and now), 0 for padding; or (batch, 1, tokens, keys) as
                `scaled_dot_product_attention` takes it, or a table of these for full and for sliding attention.
            position_ids: (batch, tokens); by default they count on from the cache.
            past_key_values: The decoding cache of the tokens before.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`.
            use_cache: Whether to return a cache; by default as configured.
            output_hidden_states: Whether to return the hidden states before each block and after the final norm.
            kwargs: Not used.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if isinstance(attention_mask, dict):
            masks = {kind: checked_mask(mask) for kind, mask in attention_mask.items()}
        else:
            masks = dict.fromkeys(KINDS.values(), checked_mask(attention_mask))
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        rotation = rotary_embedding(position_ids, self.config, x.dtype)
        before = []
        for letter, layer in zip(self.config.blocks, self.layers, strict=True):
            before.append(x)
            if letter == "M":
                x = layer(x)
            else:
                x = layer(x, rotation, masks[KINDS[letter]], past_key_values=past_key_values, past=past)
        x = self.norm(x)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=past_key_values, hidden_states=(*before, x) if wanted else None
        )


class CompositeForCausalLM(CompositePreTrainedModel, GenerationMixin):
    """A Composite model with an output layer over the vocabulary."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__(config)
        self.model = CompositeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocabulary), and with labels their loss.

        Args:
            input_ids: As for `CompositeModel`.
            attention_mask: As for `CompositeModel`.
            position_ids: As for `CompositeModel`.
            past_key_values: As for `CompositeModel`.
            inputs_embeds: As for `CompositeModel`.
            labels: (batch, tokens), the input ids themselves, -100 where no loss is wanted; shifted here.
            use_cache: As for `CompositeModel`.
            output_hidden_states: As for `CompositeModel`.
            logits_to_keep: Only the last so many tokens' logits, or those at these indices; 0 for all.
            kwargs: Passed on to the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
