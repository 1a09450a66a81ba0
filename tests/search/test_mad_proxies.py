"""The tasks beside MAD's: an oracle that sees the inputs alone answers them, and a shortcut does not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_search import mad
from composer_search.mad import IGNORE, PROXIES
from composer_search.mad.state_tracking import products


def recall_oracle(row, sampler):
    """Remember what followed each key of the pairs."""
    pairs = row[: 2 * sampler.num_pairs]
    value_of = dict(zip(pairs[::2], pairs[1::2], strict=True))
    return [value_of.get(token, 0) for token in row]


def group_oracle(row, sampler):
    """Carry a list of items along, and let each permutation rearrange it."""
    import itertools

    elements = list(itertools.permutations(range(sampler.items)))
    items, answers = list(range(sampler.items)), []
    for token in row:
        items = [elements[token][item] for item in items]
        answers.append(elements.index(tuple(items)))
    return answers


def variable_oracle(row, sampler):
    """Run the program."""
    value_of, end = {}, row.index(sampler.vocab_size - 1)
    for variable, source in zip(row[:end:2], row[1:end:2], strict=True):
        value_of[variable] = value_of.get(source, source)
    return [0] * (end + 1) + [value_of[variable] for variable in row[end + 1 :]]


ORACLES = {"multi-query-recall": recall_oracle, "variable-tracking": variable_oracle}


def oracle(task):
    return ORACLES.get(task, group_oracle)


def scored_by(answer, data, sampler):
    inputs, targets = data
    predictions = np.array([answer(row, sampler) for row in inputs.tolist()])
    return mad.accuracy(predictions, targets)


@pytest.mark.parametrize(
    ("task", "changes"),
    [(task, {}) for task in PROXIES]
    + [
        ("multi-query-recall", {"test_seq_len": 200, "power": 1.0}),
        ("multi-query-recall", {"vocab_size": 33, "seq_len": 48}),
        ("variable-tracking", {"hops": 5, "test_seq_len": 128}),
        ("variable-tracking", {"hops": 1, "num_queries": 1, "seq_len": 6}),
        ("parity", {"test_seq_len": 0, "seq_len": 20}),
    ],
)
def test_an_oracle_answers_every_scored_position(task, changes):
    sampler = PROXIES[task].at(**changes)
    data = mad.dataset(task, 64, 64, seed=1, n_valid=32, **changes)
    for part, length in (("train", sampler.length), ("valid", sampler.scored_length), ("test", sampler.scored_length)):
        assert data[part][0].shape[1] == data[part][1].shape[1] == length
        assert data[part][0].min() >= 0 and data[part][0].max() < sampler.vocab_size
        assert scored_by(oracle(task), data[part], sampler) == 1.0


def test_parity_counts_the_ones():
    inputs, targets = mad.dataset("parity", 64, 64, seed=2)["test"]
    assert np.array_equal(targets, inputs.cumsum(1) % 2)


@pytest.mark.parametrize("items", [2, 3, 4])
def test_the_tables_are_groups(items):
    table = products(items)
    elements = np.arange(len(table))
    assert np.array_equal(table[0], elements) and np.array_equal(table[:, 0], elements)
    assert (np.sort(table, axis=1) == elements).all() and (np.sort(table, axis=0) == elements[:, None]).all()
    a, b, c = np.meshgrid(elements, elements, elements)
    assert np.array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert np.array_equal(table, table.T) == (items == 2)  # the order of the elements matters from three items on


def test_every_key_is_asked_for_once_and_mostly_soon():
    sampler = PROXIES["multi-query-recall"].at()
    inputs, targets = mad.dataset("multi-query-recall", 512, 64, seed=3)["train"]
    pairs = sampler.num_pairs
    asked = [sorted(row[scored]) for row, scored in zip(inputs, targets != IGNORE, strict=True)]
    assert asked == [sorted(row[: 2 * pairs : 2]) for row in inputs]
    assert all(len(set(keys)) == pairs for keys in asked)
    share = (targets[:, 2 * pairs :] != IGNORE).mean(0)
    assert share[0] > 0.9 and share[-8:].mean() < 0.1  # weights 1 and about 1/80
    # Which key comes soon does not depend on when it was shown.
    first = inputs[targets[:, 2 * pairs] != IGNORE][:, [*range(0, 2 * pairs, 2), 2 * pairs]]
    where = (first[:, :-1] == first[:, -1:]).argmax(1)
    assert 0.35 < where.mean() / (pairs - 1) < 0.65


def test_variables_need_their_hops():
    """Who only looks up what stands after a variable is right for one in hops + 1."""
    sampler = PROXIES["variable-tracking"].at()
    data = mad.dataset("variable-tracking", 64, 512, seed=4)

    def look_up_once(row, sampler):
        end = row.index(sampler.vocab_size - 1)
        direct = dict(zip(row[:end:2], row[1:end:2], strict=True))
        return [direct.get(token, 0) for token in row]

    assert scored_by(look_up_once, data["test"], sampler) == pytest.approx(1 / 3, abs=0.03)
    end = data["test"][0].shape[1] - sampler.num_queries - 1
    variables = data["test"][0][:, :end:2]
    assert all(len(set(row)) == len(row) for row in variables.tolist())


def test_repeating_the_last_token_does_not_track_a_state():
    for task in ("parity", "permutations-3", "permutations-5"):
        sampler = PROXIES[task].at()
        data = mad.dataset(task, 64, 256, seed=5)["test"]
        chance = 1 / sampler.vocab_size
        assert scored_by(lambda row, _: row, data, sampler) < chance + 0.06  # the first position is right


@given(
    pairs=st.integers(1, 6),
    spare=st.integers(0, 9),
    more=st.integers(0, 9),
    power=st.floats(0.05, 3.0),
    seed=st.integers(0, 50),
)
@settings(max_examples=25, deadline=None)
def test_any_recall(pairs, spare, more, power, seed):
    length = 3 * pairs + spare
    changes = {"num_pairs": pairs, "seq_len": length, "test_seq_len": length + more, "power": power, "vocab_size": 41}
    sampler = PROXIES["multi-query-recall"].at(**changes)
    rng = np.random.default_rng(seed)
    for train in (True, False):
        pair = sampler.draw(rng, rng, 16, train=train)
        assert scored_by(recall_oracle, pair, sampler) == 1.0
        assert ((pair[1] != IGNORE).sum(1) == pairs).all()


@given(hops=st.integers(1, 5), queries=st.integers(1, 6), spare=st.integers(0, 8), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_any_program(hops, queries, spare, seed):
    changes = {"hops": hops, "num_queries": queries, "seq_len": 2 * (hops + 1 + spare) + 1 + queries, "vocab_size": 61}
    sampler = PROXIES["variable-tracking"].at(**changes)
    rng = np.random.default_rng(seed)
    assert scored_by(variable_oracle, sampler.draw(rng, rng, 16, train=True), sampler) == 1.0


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("multi-query-recall", {"vocab_size": 32}, r"vocab_size=32: expected at least 2·num_pairs \+ 1 = 33"),
        ("multi-query-recall", {"seq_len": 47}, r"seq_len=47: expected at least 3·num_pairs = 48"),
        ("multi-query-recall", {"power": 0.0}, "power=0.0: expected a number above 0"),
        ("multi-query-recall", {"test_seq_len": 100}, "test_seq_len=100: expected 0, or at least seq_len=128"),
        ("multi-query-recall", {"reference_behaviour": True}, "has no setting 'reference_behaviour'"),
        ("parity", {"vocab_size": 3}, "vocab_size=3: expected 2, the elements of the group"),
        ("permutations-5", {"vocab_size": 5}, "vocab_size=5: expected 120"),
        ("variable-tracking", {"seq_len": 63}, "seq_len=63: expected 1 .* even"),
        ("variable-tracking", {"hops": 24}, "seq_len=64: expected .* at least 50"),
        ("variable-tracking", {"vocab_size": 48}, "vocab_size=48: expected at least 49"),
        ("variable-tracking", {"test_seq_len": 256}, "vocab_size=128: expected at least 241: test_seq_len holds 120"),
        ("parity", {"hops": 3}, r"no setting 'hops'.*\(.*belongs to variable-tracking\)"),
        ("multi-query-recal", {}, "did you mean 'multi-query-recall'"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(task, changes, message):
    with pytest.raises(UsageError, match=message):
        mad.dataset(task, 1, 1, 0, **changes)


def test_cached_data_are_the_same(tmp_path):
    for _ in range(2):  # made, then read
        cached = mad.cached_dataset(tmp_path, "permutations-3", 8, 4, 0, n_valid=4)
        made = mad.dataset("permutations-3", 8, 4, 0, n_valid=4)
        for part in made:
            assert all(np.array_equal(a, b) for a, b in zip(cached[part], made[part], strict=True))
    assert len(list(tmp_path.iterdir())) == 1
