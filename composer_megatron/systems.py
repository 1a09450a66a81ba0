"""The systems that a Composite is compared with: each a rule that makes a sequence for a shape.

A system keeps its published order and ratio of blocks. How often they repeat follows from the shape: so often that the
weights that a token meets come closest to those of the shape's Llama-style baseline (`Architecture.baseline`). Widths
of experts, recurrences and latent attention are the shape's own (`composer_megatron.widths`), not the published ones:
the systems are compared as orders of blocks, at one size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer_megatron.architecture import Architecture
from composer_megatron.files import read_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

EVIDENCE = Path(__file__).with_suffix(".json")
"""What of each system was seen to run; ``tools/check_systems.py`` writes it, and a test compares."""

LAYOUTS = MappingProxyType({"TP=2": "TP2+SP", "PP=2": "PP2"})
"""Columns of the table, and the layouts they stand for; tensor parallelism is with sequence parallelism."""

Rule = Callable[[Shape], str]
"""From a shape to the letters of a sequence."""


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        name: Key in `SYSTEMS`.
        title: For people.
        source: Where it is from, and in what it differs here.
        rule: Makes the letters.
    """

    name: str
    title: str
    source: str
    rule: Rule

    def sequence(self, shape: Shape) -> CompositeSequence:
        """Its blocks in that shape."""
        return CompositeSequence(self.rule(shape))

    def architecture(self, shape: Shape) -> Architecture:
        """Its blocks and that shape."""
        return Architecture(self.sequence(shape), shape, {"method": "system", "system": self.name})


def _matched(blocks: Callable[[int], str]) -> Rule:
    """The number of repetitions, at least 1, at which the active weights come closest to the baseline's."""

    def rule(shape: Shape) -> str:
        def weights(times: int) -> int:
            return Architecture(CompositeSequence(blocks(times)), shape).active_parameters

        target, times = Architecture(CompositeSequence("A"), shape).baseline().active_parameters, 1
        while abs(weights(times + 1) - target) < abs(weights(times) - target):
            times += 1
        return blocks(times)

    return rule


def _repeated(unit: str) -> Rule:
    return _matched(lambda times: unit * times)


def _with_mlps(mixers: str, mlp: str = "M") -> str:
    return "".join(mixer + mlp for mixer in mixers)


def _llama(shape: Shape) -> str:
    return _with_mlps("A" * shape.baseline_pairs)


def _sandwich(shape: Shape) -> str:
    """A^k (AM)^(n-k) M^k, with the paper's k = 6 of n = 16 in proportion."""
    pairs = shape.baseline_pairs
    ends = (3 * pairs + 4) // 8
    return "A" * ends + _with_mlps("A" * (pairs - ends)) + "M" * ends


def _jet_nemotron(pairs: int) -> str:
    """Of 28 mixers the 15th and 20th are A, the 21st and 22nd W, all others G; in proportion for other numbers."""
    mixers = ["G"] * pairs
    for letter, places in (("W", (20, 21)), ("A", (14, 19))):
        for place in places:
            mixers[place * pairs // 28] = letter
    return _with_mlps("".join(mixers))


def _deepseek(pairs: int) -> str:
    """The first 3 of 61 MLPs are dense, in proportion, but at least one."""
    dense = max(1, (3 * pairs + 30) // 61)
    return _with_mlps("L" * dense) + _with_mlps("L" * (pairs - dense), "E")


_ROWS = (
    System(
        name="llama",
        title="Llama 3.2",
        source="attention and MLP in turn (Grattafiori et al., arXiv 2407.21783)",
        rule=_llama,
    ),
    System(
        name="sandwich",
        title="Sandwich Transformer",
        source="attention moved to the front, MLPs to the back (Press et al., arXiv 1911.03864)",
        rule=_sandwich,
    ),
    System(
        name="striped",
        title="1:2 striped attention",
        source="two MLPs to a block of attention, the hand-made baseline of Composer (arXiv 2510.00379)",
        rule=_repeated("AMM"),
    ),
    System(
        name="mad-striped",
        title="MAD-style striped hybrid",
        source="recurrences and attention in stripes, as in MAD (Poli et al., arXiv 2403.17844); here Mamba-2, 3:1",
        rule=_repeated(_with_mlps("SSSA")),
    ),
    System(
        name="mamba2-hybrid",
        title="Mamba-2-Hybrid",
        source="43 % Mamba-2, 7 % attention, 50 % MLP (Waleffe et al., arXiv 2406.07887)",
        rule=_repeated(_with_mlps("SSSASSS")),
    ),
    System(
        name="qwen3-next",
        title="Qwen3-Next-like",
        source="three Gated DeltaNet to one attention, each with a mixture of experts",
        rule=_repeated(_with_mlps("GGGA", "E")),
    ),
    System(
        name="deepseek-v3",
        title="DeepSeek-V3-like",
        source="latent attention, the first MLPs dense and then experts (arXiv 2412.19437)",
        rule=_matched(_deepseek),
    ),
    System(
        name="jet-nemotron",
        title="Jet-Nemotron-2B-like",
        source="its places of full and windowed attention (arXiv 2508.15884); Gated DeltaNet for its own JetBlock",
        rule=_matched(_jet_nemotron),
    ),
    System(
        name="star",
        title="STAR-like",
        source="mixers in no regular order, as evolution leaves them (arXiv 2411.17800); its units are others, and so "
        "is the order",
        rule=_repeated("SMGMWMSMAMGM"),
    ),
)

SYSTEMS = MappingProxyType({row.name: row for row in _ROWS})
"""Every system by its name, in the order in which tables list them."""


def table(shape: Shape, seq_len: int) -> list[dict[str, Any]]:
    """One row for each system at that shape, as JSON values.

    Counts are the architecture's; ``trains``, ``exports`` and the layouts are `EVIDENCE`, found at a tiny shape.

    Args:
        shape: The widths, and the baseline whose size the systems have.
        seq_len: Tokens in a sequence.
    """
    evidence = read_json(EVIDENCE, "the evidence on systems")
    rows = []
    for system in SYSTEMS.values():
        architecture = system.architecture(shape)
        counts = {
            "parameters": architecture.params_total,
            "active_parameters": architecture.active_parameters,
            "state_bytes": architecture.state_bytes(seq_len),
            "flops_per_token": architecture.flops_per_token(seq_len),
        }
        about = {"system": system.name, "title": system.title, "source": system.source}
        rows.append(about | {"sequence": architecture.sequence.notation} | counts | evidence[system.name])
    return rows
