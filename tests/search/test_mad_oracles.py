"""Each MAD task is solved by an oracle that sees the inputs alone; every sequence has the form that is promised."""

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_search import mad
from composer_search.mad import IGNORE

RECALL = ("in-context-recall", "noisy-in-context-recall")
NEXT_TOKEN = (*RECALL, "fuzzy-in-context-recall")
examples = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def recall_oracle(row, sampler):
    """Remember what followed each key; the pairs are aligned, so keys are at even places, save the copied one."""
    value_of, answers = {}, []
    end = len(row) if sampler.multi_query else len(row) - 2
    for place in range(len(row)):
        answers.append(value_of.get(row[place], 0))
        if place % 2 == 0 and place + 1 < end:
            value_of[row[place]] = row[place + 1]
    return answers


def fuzzy_oracle(row, sampler):
    """Read runs of key tokens and of value tokens; a run of values belongs to the run of keys before it."""
    value_of, key, value, answers = {}, (), (), []
    for token in row:
        if token < sampler.num_keys:
            if value:
                value_of.setdefault(key, value)
                key, value = (), ()
            key += (token,)
        elif token < sampler.num_content:
            value += (token,)
        else:
            if value:
                value_of.setdefault(key, value)
            key, value = (), ()
        known = value_of.get(key, ())
        answers.append(known[len(value)] if len(value) < len(known) else 0)
    return answers


def memorization_oracle(row, sampler, facts):
    """Recall the value of the key before each insert token; `facts` are those that training showed."""
    return [facts.get(row[place - 1], 0) if place % 2 else 0 for place in range(len(row))]


def compression_oracle(row, sampler):
    """Copy the input."""
    return list(row)


def copying_oracle(row, sampler):
    """Write what is neither blank nor copy token at the end."""
    content = [token for token in row if token < sampler.vocab_size - 2]
    return [0] * (len(row) - len(content)) + content


ORACLES = {
    "in-context-recall": recall_oracle,
    "noisy-in-context-recall": recall_oracle,
    "fuzzy-in-context-recall": fuzzy_oracle,
    "memorization": memorization_oracle,
    "compression": compression_oracle,
    "selective-copying": copying_oracle,
}


def learnt_facts(train):
    inputs, targets = train
    scored = targets[:, 1::2] != IGNORE
    return dict(zip(inputs[:, ::2][scored].tolist(), targets[:, 1::2][scored].tolist(), strict=True))


def oracle_predictions(task, data, part="test", **task_settings):
    sampler = mad.TASKS[task].at(**task_settings)
    oracle = ORACLES[task]
    if task == "memorization":
        oracle = functools.partial(oracle, facts=learnt_facts(data["train"]))
    return np.array([oracle(row, sampler) for row in data[part][0].tolist()])


@pytest.mark.parametrize(
    ("task", "changes"),
    [(task, {}) for task in mad.TASKS]
    + [(task, {"multi_query": False}) for task in NEXT_TOKEN]
    + [(task, {"reference_behaviour": True}) for task in mad.TASKS if not task.startswith("fuzzy")]
    + [
        ("fuzzy-in-context-recall", {"vocab_size": 128}),
        ("fuzzy-in-context-recall", {"seq_len": 13}),
        ("fuzzy-in-context-recall", {"vocab_size": 32, "noise_vocab_size": 8, "frac_noise": 0.5}),
        ("fuzzy-in-context-recall", {"vocab_size": 32, "noise_vocab_size": 8, "frac_noise": 0.9, "multi_query": False}),
        ("noisy-in-context-recall", {"frac_noise": 0.95, "seq_len": 16}),
        ("memorization", {"noise_vocab_size": 16, "frac_noise": 0.3}),
        ("compression", {"noise_vocab_size": 4, "frac_noise": 0.3}),
        ("selective-copying", {"num_tokens_to_copy": 96}),
    ],
)
def test_an_oracle_answers_every_scored_position(task, changes):
    data = mad.dataset(task, 512, 512, seed=3, n_valid=64, **changes)
    for part in ("valid", "test"):
        predictions, targets = oracle_predictions(task, data, part, **changes), data[part][1]
        wrong = (predictions != targets) & (targets != IGNORE)
        assert not wrong.any(), f"sequence and place {np.argwhere(wrong)[0]}"
        assert mad.macro_accuracy(predictions, targets, batch_size=128) == 1.0
        assert mad.accuracy(predictions, targets) == 1.0


def test_each_oracle_can_fail():
    """A wrong answer is seen: the oracle of one data set fails on inputs whose scored history was shuffled."""
    for task in mad.TASKS:
        data = mad.dataset(task, 256, 64, seed=0)
        inputs, targets = data["test"]
        shuffled = np.random.default_rng(0).permuted(inputs, axis=1)
        predictions = oracle_predictions(task, {**data, "test": (shuffled, targets)})
        assert mad.accuracy(predictions, targets) < 0.6


@st.composite
def task_settings(draw):
    """A task and settings with so many sequences that 8 of them are different with certainty."""
    task = draw(st.sampled_from(list(mad.TASKS)))
    chosen = {}
    multi_query = True
    if task in NEXT_TOKEN:
        multi_query = chosen["multi_query"] = draw(st.booleans())
    if task != "selective-copying" and draw(st.booleans()):
        chosen["noise_vocab_size"] = draw(st.integers(1, 9))
        chosen["frac_noise"] = draw(st.floats(0, 0.8))
    noise = chosen.get("noise_vocab_size", mad.TASKS[task].defaults.get("noise_vocab_size", 0))
    if task == "fuzzy-in-context-recall":
        k, v = chosen["k_motif_size"], chosen["v_motif_size"] = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        chosen["vocab_size"] = noise + 1 + (not multi_query) + draw(st.integers(max(2 * max(k, v) + 1, 9), 60))
        chosen["seq_len"] = draw(st.integers(2 * (k + v) + 1 + 16, 80))
    elif task == "selective-copying":
        copied = chosen["num_tokens_to_copy"] = draw(st.integers(8, 20))
        chosen["vocab_size"] = draw(st.integers(8, 60))
        chosen["seq_len"] = draw(st.integers(2 * copied + 2, 80))
    else:
        chosen["vocab_size"] = noise + draw(st.integers(18, 60))
        chosen["seq_len"] = 2 * draw(st.integers(16, 40))
    return task, chosen


@examples
@given(task_settings(), st.integers(0, 2**64), st.booleans())
def test_any_settings_give_what_the_task_promises(chosen, seed, reference_behaviour):
    task, changes = chosen
    sampler = mad.TASKS[task].at(**changes)
    data = mad.dataset(task, 8, 8, seed, reference_behaviour=reference_behaviour, **changes)
    for inputs, targets in data.values():
        assert inputs.shape == targets.shape == (8, sampler.length)
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.min() >= 0 and inputs.max() < sampler.vocab_size
        assert ((targets == IGNORE) | ((targets >= 0) & (targets < sampler.vocab_size))).all()
        assert (targets[:, -1] != IGNORE).all() or task == "memorization"
        assert (targets != IGNORE).any(axis=1).all()
    inputs, targets = data["test"]
    scored = targets != IGNORE
    if task in NEXT_TOKEN:
        assert (data["train"][1][:, :-1] == data["train"][0][:, 1:]).all(), "training targets are the next tokens"
        shown_next = scored[:, :-1]
        assert (targets[:, :-1][shown_next] == inputs[:, 1:][shown_next]).all()
        assert ((targets >= sampler.num_keys) & (targets < sampler.num_content))[scored].all(), "values alone"
        if not sampler.multi_query:
            last = 1 if task in RECALL else sampler.v_motif_size
            assert (scored.sum(axis=1) <= last).all()
            assert (inputs == sampler.vocab_size - 1).sum(axis=1).tolist() == [1] * 8, "one copy prefix"
    if task == "fuzzy-in-context-recall":
        padding = inputs == sampler.vocab_size - sampler.num_specials
        assert padding[:, 0].all() and (np.diff(padding.astype(int), axis=1) <= 0).all(), "padded on the left alone"


@examples
@given(task_settings(), st.integers(0, 2**32))
def test_oracles_at_any_settings(chosen, seed):
    task, changes = chosen
    data = mad.dataset(task, 256, 8, seed, **changes)
    predictions, targets = oracle_predictions(task, data, **changes), data["test"][1]
    known = targets != IGNORE
    if task == "memorization":  # keys that training never showed cannot be known
        trained = np.isin(data["test"][0][:, ::2], list(learnt_facts(data["train"])))
        known &= np.repeat(trained, 2, axis=1)
    assert (predictions == targets)[known].all()


def test_recall_has_one_value_for_each_key():
    inputs, _ = mad.dataset("in-context-recall", 512, 1, seed=0)["train"]
    for row in inputs[:, :-1]:
        pairs = set(map(tuple, row.reshape(-1, 2).tolist()))
        assert len({key for key, _ in pairs}) == len(pairs)
        assert all(key < 8 <= value for key, value in pairs)


def test_memorization_has_one_map_for_all_parts_and_different_values():
    data = mad.dataset("memorization", 256, 256, seed=5)
    facts = learnt_facts(data["train"])
    assert learnt_facts(data["test"]) == facts
    assert sorted(facts) == list(range(127)) and len(set(facts.values())) == 127
    assert min(facts.values()) >= 127 and max(facts.values()) < 255
    assert learnt_facts(mad.dataset("memorization", 256, 1, seed=5, seq_len=64)["train"]) == facts
    assert learnt_facts(mad.dataset("memorization", 256, 1, seed=6)["train"]) != facts


def test_noise_tokens_are_no_answers_unless_the_reference_is_asked_for():
    noise = {"noise_vocab_size": 64, "frac_noise": 0.3}
    for task in ("memorization", "compression"):
        num_content = mad.TASKS[task].at(vocab_size=256, **noise).num_content
        ours = mad.dataset(task, 256, 64, seed=0, vocab_size=256, **noise)["test"]
        reference = mad.dataset(task, 256, 64, seed=0, vocab_size=256, reference_behaviour=True, **noise)["test"]
        noise_answers = [((num_content <= targets) & (targets < 255)).sum() for _, targets in (ours, reference)]
        assert noise_answers[0] == 0 < noise_answers[1]
        is_noise = (num_content <= ours[0]) & (ours[0] < 255)
        assert is_noise.any() and (ours[1][is_noise] == IGNORE).all()


def test_compression_scores_every_place_of_inputs():
    for inputs, targets in mad.dataset("compression", 64, 64, seed=0).values():
        assert (inputs == targets).all()
        assert (inputs[:, -1] == 15).all() and (inputs[:, :-1] < 15).all()


def test_copying_places_blanks_before_content_and_answers_after_the_copy_token():
    inputs, targets = mad.dataset("selective-copying", 64, 256, seed=0)["test"]
    assert (inputs[:, -17] == 15).all() and (inputs[:, -16:] == 14).all()
    assert (inputs[:, -18] < 14).all(), "no blank between the last content and the copy token"
    assert ((inputs < 14).sum(axis=1) == 16).all()
    assert (targets[:, :-16] == IGNORE).all()
