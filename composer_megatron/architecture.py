"""Architecture: a sequence and a shape, their exact costs, and the file that the stages hand to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import read_json, write_json
from composer_megatron.primitives import PRIMITIVES, Primitive
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

_FORMAT = "composer-architecture"
_VERSION = 1


@dataclass(frozen=True)
class Architecture:
    """A whole model. All counts are exact integers, equal to what the built model holds.

    Attributes:
        sequence: The order of the blocks.
        shape: The widths.
        origin: How it came about (study, method, …), kept in the file and in reports; no count depends on it.
    """

    sequence: CompositeSequence
    shape: Shape
    origin: dict[str, Any] = field(default_factory=dict, compare=False)

    def _sum(self, cost: Callable[[Primitive], int]) -> int:
        return sum(count * cost(PRIMITIVES[symbol]) for symbol, count in self.sequence.counts.items())

    @property
    def matrix_parameters(self) -> int:
        """Elements of the blocks' weight matrices: the "model size" of Composer's extrapolation rules."""
        return self._sum(lambda primitive: primitive.matrix_parameters(self.shape))

    @property
    def active_parameters(self) -> int:
        """Those of `matrix_parameters` that one token is multiplied with; fewer where there are experts."""
        return self._sum(lambda primitive: primitive.active_parameters(self.shape))

    @property
    def embedding_parameters(self) -> int:
        """Elements of the embedding, and of the output layer where it is not tied to the embedding."""
        return self.shape.vocab_size * self.shape.hidden_size * (1 if self.shape.tied_embeddings else 2)

    @property
    def params_non_embedding(self) -> int:
        """All parameters but `embedding_parameters`: matrices, the blocks' other weights and the final norm."""
        vectors = self._sum(lambda primitive: primitive.vector_parameters(self.shape)) + self.shape.hidden_size
        return self.matrix_parameters + vectors

    @property
    def params_total(self) -> int:
        """All parameters, with the vocabulary unpadded."""
        return self.params_non_embedding + self.embedding_parameters

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs (forward and backward) a token of a causal sequence of `seq_len` tokens.

        6 FLOPs for each active weight of a matrix, the output layer included, and three times the forward FLOPs of
        attention over the mean context of (seq_len + 1) / 2 keys, or of a recurrence and its convolution. Norms,
        activations and softmax are not counted.
        """
        if seq_len < 1:
            raise UsageError(f"seq_len={seq_len}; expected at least 1")
        matrices = self.active_parameters + self.shape.vocab_size * self.shape.hidden_size
        mixing_twice = self._sum(lambda primitive: primitive.mixing_flops(self.shape, seq_len))
        return 6 * matrices + 3 * mixing_twice // 2

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes that one token adds to the decoding cache; 2 bytes an element are bf16.

        Sliding-window blocks stop growing at their window, and recurrent ones never grow: see `state_bytes`.
        """
        return bytes_per_element * self._sum(lambda primitive: primitive.cache_elements(self.shape))

    def state_bytes(self, seq_len: int, bytes_per_element: int = 2) -> int:
        """Bytes of all that decoding keeps of one sequence of `seq_len` tokens: caches, windows, recurrent states."""
        return bytes_per_element * self._sum(lambda primitive: primitive.state_elements(self.shape, seq_len))

    def baseline(self) -> Architecture:
        """The Llama-style model of this shape: attention and MLP in turn, `Shape.baseline_pairs` times."""
        pairs = CompositeSequence("AM" * self.shape.baseline_pairs)
        return Architecture(pairs, self.shape, {"method": "baseline"})

    def matched_baseline(self, step: int = 8) -> Architecture:
        """The Llama-style model with as many weights as this one: `baseline` with other MLP widths, for a fair race.

        The width is the multiple of `step` that comes closest; at least one step.
        """
        shape, pairs = self.shape, self.shape.baseline_pairs
        attention = PRIMITIVES["A"].matrix_parameters(shape)
        exact = (Fraction(self.matrix_parameters, pairs) - attention) / (3 * shape.hidden_size)
        width = max(step, step * round(exact / step))
        name = shape.name if width == shape.ffn_hidden_size else f"{shape.name}-ffn{width}"
        matched = dataclasses.replace(shape, name=name, ffn_hidden_size=width)
        return Architecture(self.baseline().sequence, matched, {"method": "matched baseline", "of": str(self.sequence)})

    def summary(self, seq_len: int) -> dict[str, Any]:
        """The counts beside the baseline's, as JSON values; ratios are baseline over this architecture.

        A ratio against no cache at all is None.
        """
        baseline = self.baseline()

        def ratio(of_baseline: int, of_this: int) -> float | None:
            return float(Fraction(of_baseline, of_this)) if of_this else None

        return {
            "sequence": str(self.sequence),
            "runs": [[run.symbol, run.length] for run in self.sequence.runs],
            "blocks": len(self.sequence),
            "attention": self.sequence.count("A"),
            "mlp": self.sequence.count("M"),
            "counts": self.sequence.counts,
            "params_non_embedding": self.params_non_embedding,
            "params_total": self.params_total,
            "active_parameters": self.active_parameters,
            "kv_bytes_per_token": self.kv_bytes_per_token(),
            "state_bytes": self.state_bytes(seq_len),
            "kv_ratio": ratio(baseline.kv_bytes_per_token(), self.kv_bytes_per_token()),
            "flops_per_token": self.flops_per_token(seq_len),
            "flops_ratio": ratio(baseline.flops_per_token(seq_len), self.flops_per_token(seq_len)),
        }

    def save(self, path: Path) -> None:
        """Write the architecture file, in one step."""
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "sequence": str(self.sequence),
            "shape": self.shape.as_dict(),
            "origin": self.origin,
        }
        write_json(path, values)

    @classmethod
    def load(cls, path: Path) -> Architecture:
        """Read an architecture file.

        Raises:
            FileError: If it is missing, no JSON, of another format, or of a version that this program does not know.
        """
        values = read_json(path, "an architecture file")
        if values.get("format") != _FORMAT:
            raise FileError(f'{path} is not an architecture file: expected "format": "{_FORMAT}"')
        if values.get("version") != _VERSION:
            raise FileError(f"{path} has version {values.get('version')!r}; this program reads version {_VERSION}")
        sequence, shape, origin = values.get("sequence"), values.get("shape"), values.get("origin", {})
        if not isinstance(sequence, str) or not isinstance(shape, dict) or not isinstance(origin, dict):
            raise FileError(f"{path}: expected a sequence (text), a shape (object) and an origin (object)")
        try:
            return cls(CompositeSequence.parse(sequence), Shape.from_dict(shape, where="its shape"), origin)
        except UsageError as error:
            raise FileError(f"{path}: {error}") from None
