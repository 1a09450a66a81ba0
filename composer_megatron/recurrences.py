"""Linear recurrences in plain PyTorch: what Mamba-2 and Gated DeltaNet compute between their projections.

Both keep for each head a state, a matrix S of keys by values, which decays and takes up one outer product a token:

    S_t = a_t S_(t-1) + k_t u_tᵀ          o_t = S_tᵀ q_t

Mamba-2 (arXiv 2405.21060) adds its input as it is, u_t = v_t. Gated DeltaNet (arXiv 2412.06464) adds what the state
does not yet know of it, u_t = β_t (v_t - a_t S_(t-1)ᵀ k_t).

`scan` works in chunks: within a chunk all tokens at once by matrix products, from chunk to chunk one step after the
other. So its cost grows linearly with the length, and a state can be handed in and out, which is all that decoding
needs. Everything is computed in the type of `value`, which should be fp32 or wider.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    strength: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over whole sequences.

    Args:
        query: (b, s, heads, keys).
        key: (b, s, heads, keys).
        value: (b, s, heads, values).
        log_decay: (b, s, heads), ln a_t, at most 0.
        strength: (b, s, heads), β_t of the delta rule; None for the plain rule.
        state: (b, heads, keys, values), before the first token; None for zeros.
        chunk: Tokens worked on at once.

    Returns:
        Outputs (b, s, heads, values), and the state after the last token.
    """
    batch, length, heads, width = value.shape
    if state is None:
        state = value.new_zeros(batch, heads, key.shape[-1], width)
    outputs = []
    for start in range(0, length, chunk):
        span = slice(start, start + chunk)
        q, k, v, decay = (tensor[:, span].transpose(1, 2) for tensor in (query, key, value, log_decay))
        beta = None if strength is None else strength[:, span].transpose(1, 2)
        output, state = _chunk(q, k, v, decay, beta, state)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1), state


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk, heads before tokens: outputs (b, heads, c, values) and the state after it."""
    since_start = log_decay.cumsum(-1)
    tokens = value.shape[-2]
    past = torch.ones(tokens, tokens, dtype=torch.bool, device=value.device).tril()
    # ln of the decay from token j to token i; from later tokens nothing comes.
    between = (since_start[..., :, None] - since_start[..., None, :]).masked_fill(~past, -torch.inf).exp()
    start, end = since_start.exp()[..., None], (since_start[..., -1:] - since_start).exp()[..., None]
    added = value
    if strength is not None:
        # u_i = β_i (v_i - start_i S₀ᵀk_i - Σ_(j<i) between_ij (k_i·k_j) u_j): a unit lower triangular system.
        known = strength[..., None] * (value - (start * key) @ state)
        overlap = (strength[..., None] * (key @ key.mT) * between).tril(-1)
        eye = torch.eye(tokens, dtype=value.dtype, device=value.device)
        added = torch.linalg.solve_triangular(overlap + eye, known, upper=False, unitriangular=True)
    output = (start * query) @ state + ((query @ key.mT) * between) @ added
    after = since_start[..., -1].exp()[..., None, None] * state + (end * key).mT @ added
    return output, after


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own weights, over the token and the ones before it.

    Args:
        x: (b, s, channels).
        weight: (channels, width); the last column meets the token itself.
        bias: (channels,).
        before: (b, width - 1, channels), the tokens before the first; None for zeros.

    Returns:
        (b, s, channels).
    """
    channels, width = weight.shape
    padded = F.pad(x, (0, 0, width - 1, 0)) if before is None else torch.cat([before, x], 1)
    return F.conv1d(padded.mT, weight[:, None], bias, groups=channels).mT


def unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length 1, as Gated DeltaNet does with queries and keys."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
