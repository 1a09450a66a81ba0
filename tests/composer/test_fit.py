"""A trial of a batch measures that batch, and nothing that trials or models before it left; on a GPU of cardboard."""

import pytest
import torch

from composer_megatron.architecture import Architecture
from composer_megatron.inference import fit
from composer_megatron.inference.limits import PREFILL_TOKENS, SPARE
from composer_megatron.inference.weights import Weights, random_weights
from composer_megatron.kv import CUDA_BYTES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

TOTAL = 10 * 10**9
SMALL = Architecture(CompositeSequence.parse("2A1M"), PRESETS["tiny"])


class Card:
    """A GPU with an allocator that keeps what it was ever given, and workspaces of cuBLAS among that, until told."""

    def __init__(self, outside: int, batch_takes: int) -> None:
        self.outside, self.batch_takes = outside, batch_takes
        self.kept = self.workspaces = self.highest = 0
        self.events = list[str]()
        self.admitted = list[list[int]]()
        self.out_of_memory = False

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, function in {
            "is_available": lambda: True,
            "synchronize": lambda: None,
            "mem_get_info": lambda: (TOTAL - self.outside - self.reserved(), TOTAL),
            "memory_reserved": self.reserved,
            "max_memory_reserved": lambda: self.highest,
            "reset_peak_memory_stats": self.reset,
            "empty_cache": self.empty,
            "memory_stats": lambda: {"requested_bytes.all.current": 0},
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear, raising=False)
        monkeypatch.setattr(fit, "Engine", lambda *given: Engine(self, *given))

    def reserved(self) -> int:
        return self.kept + self.workspaces

    def reset(self) -> None:
        self.highest = self.reserved()

    def clear(self) -> None:
        self.kept, self.workspaces = self.kept + self.workspaces, 0

    def empty(self) -> None:
        self.kept = 0


class Engine:
    """Takes memory like one: for its batch, and a workspace on a stream that nobody takes again."""

    def __init__(self, card: Card, weights: Weights, rows: int, capacity: int) -> None:
        self.card, self.rows, self.capacity = card, rows, capacity
        card.kept += card.batch_takes
        card.highest = max(card.highest, card.reserved())
        if card.out_of_memory:
            raise torch.OutOfMemoryError

    def admit(self, admissions: list) -> None:
        self.card.events.append("admit")
        self.card.admitted.append([len(admission.prompt) for admission in admissions])
        assert [admission.row for admission in admissions] == list(range(len(admissions)))

    def step(self) -> None:
        if self.card.events[-1] != "step":
            self.card.events.append("step")
            self.card.workspaces += 32 * 2**20
            self.card.highest = max(self.card.highest, self.card.reserved())


@pytest.fixture
def weights() -> Weights:
    return random_weights(SMALL, torch.bfloat16, torch.device("cpu"))


def test_batches_one_after_the_other_take_what_each_takes_alone(monkeypatch, weights):
    card = Card(outside=800 * 10**6, batch_takes=3 * 10**9)
    card.put_in(monkeypatch)
    card.kept = 2 * 10**9  # of a model before
    trials = [fit.try_batch(SMALL, weights, 4, 64) for _ in range(5)]
    assert {trial.used for trial in trials} == {3_800_000_000 + 2 * 32 * 2**20}
    assert {trial.others for trial in trials} == {0}
    assert card.reserved() == 0


def test_a_batch_without_room_leaves_nothing_behind(monkeypatch, weights):
    card = Card(outside=800 * 10**6, batch_takes=3 * 10**9)
    card.put_in(monkeypatch)
    card.out_of_memory = True
    assert fit.try_batch(SMALL, weights, 4, 64).used is None
    assert card.reserved() == 0
    card.out_of_memory = False
    assert fit.try_batch(SMALL, weights, 4, 64).used == 3_800_000_000 + 2 * 32 * 2**20


def test_other_processes_are_not_counted(monkeypatch, weights):
    card = Card(outside=CUDA_BYTES + 5 * 10**9, batch_takes=10**9)
    card.put_in(monkeypatch)
    trial = fit.try_batch(SMALL, weights, 4, 64)
    assert trial.used == 10**9 + 2 * 32 * 2**20 + CUDA_BYTES
    assert trial.others == 5 * 10**9


@pytest.mark.parametrize(
    ("batch", "context", "together"),
    [(100, 2048, 16), (3, 2048, 3), (100, PREFILL_TOKENS, 1), (2, 4 * PREFILL_TOKENS, 1), (100, 3000, 10)],
)
def test_prompts_fill_a_pass_before_and_beside_the_captured_step(monkeypatch, weights, batch, context, together):
    card = Card(outside=0, batch_takes=0)
    card.put_in(monkeypatch)
    monkeypatch.setattr(fit, "_cache_bytes", lambda *_: 0)
    fit.try_batch(SMALL, weights, batch, context)
    assert card.events == ["admit", "step", "admit", "step"]
    assert card.admitted == [[context - SPARE] * together] * 2
