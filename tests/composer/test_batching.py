"""Jobs through a loop that looks ahead: each gets its own tokens, all of them, and none past its end."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.inference.batching import Job, decode


class Counting:
    """A loop whose rows count up from a hundred times their prompt's token; what is not asked for in time is lost."""

    def __init__(self, rows: int, span: int, capacity: int) -> None:
        self.rows, self.span, self.capacity = rows, span, capacity
        self._made = [[-1] for _ in range(rows)]
        self.steps = 0

    def admit(self, admissions) -> None:
        for admission in admissions:
            self._made[admission.row] = [100 * admission.prompt[0] - 1]

    def step(self) -> None:
        self.steps += 1
        for made in self._made:
            made.append(made[-1] + 1)

    def recent(self, steps: int):
        class Here:
            tokens = torch.tensor([([-1] * steps + made)[-steps:] for made in self._made])

            def wait(self) -> torch.Tensor:
                return self.tokens

        return Here()


@settings(max_examples=200, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 14)), min_size=1, max_size=9),
    rows=st.integers(1, 4),
    span=st.integers(1, 5),
)
def test_every_job_gets_its_tokens_up_to_its_end(jobs, rows, span):
    """`jobs` are limits and after how many tokens the receiver has enough, which may be later."""
    loop = Counting(rows, span, 20)
    made = [Job([number], limit) for number, (limit, _) in enumerate(jobs)]
    found = [[] for _ in jobs]
    for number, token in decode(loop, made):
        found[number].append(token)
        made[number].ended = len(found[number]) >= jobs[number][1]
    wanted = [min(limit, enough) for limit, enough in jobs]
    assert found == [list(range(100 * number, 100 * number + count)) for number, count in enumerate(wanted)]
    # A row is given back when its job ends, or one look later; so no job costs more than its tokens and two spans.
    assert loop.steps <= sum(count + 2 * span for count in wanted)
