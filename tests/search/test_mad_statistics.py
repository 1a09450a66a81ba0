"""The tasks' distributions: exact expectations, the numbers measured on the reference, and a slow sampler of our own.

Seeds are fixed. Bounds are a number of standard errors of the mean, estimated from the same sample; four of them would
be passed by chance once in 16,000 draws.
"""

import itertools
import math

import numpy as np
import pytest

from composer_search import mad
from composer_search.mad import IGNORE


def scored_tokens(task, n=5_000, **changes):
    """Scored test tokens of each of `n` sequences."""
    return (mad.dataset(task, 1, n, seed=11, **changes)["test"][1] != IGNORE).sum(axis=1)


def assert_mean(values, expected, errors=4.0, slack=0.0):
    values = np.asarray(values, float)
    bound = errors * values.std(ddof=1) / math.sqrt(len(values)) + slack
    assert abs(values.mean() - expected) <= bound, f"{values.mean():.5f}, expected {expected:.5f} ± {bound:.5f}"


def expected_recall(keys, seq_len, noise=0.0):
    """Scored tokens: pairs shown, less the different keys among them, and the last pair."""
    slots = seq_len // 2 - 1
    pairs = 1 + (slots - 1) * (1 - noise)  # one place is never noise
    missed = (1 - 1 / keys) * (noise + (1 - noise) * (1 - 1 / keys)) ** (slots - 1)
    return pairs - keys * (1 - missed) + 1


@pytest.mark.parametrize(
    ("task", "changes", "keys", "noise", "measured"),
    [
        ("in-context-recall", {}, 8, 0.0, 0.441),
        ("in-context-recall", {"vocab_size": 128}, 64, 0.0, 0.187),
        ("noisy-in-context-recall", {}, 8, 0.2, 0.342),
        ("noisy-in-context-recall", {"frac_noise": 0.8}, 8, 0.8, 0.062),
    ],
)
def test_recall_scores_the_expected_fraction(task, changes, keys, noise, measured):
    tokens = scored_tokens(task, **changes)
    expected = expected_recall(keys, 128, noise)
    assert_mean(tokens, expected)
    assert tokens.min() >= 1
    # The figure measured on the reference has three decimals; its last noise-free place differs by .2/127 at most.
    assert expected / 127 == pytest.approx(measured, abs=0.0016)


def test_recall_without_multi_query_scores_one_token():
    assert (scored_tokens("in-context-recall", 500, multi_query=False) == 1).all()


def test_the_last_key_is_uniform_over_different_keys_and_not_over_occurrences():
    inputs, _ = mad.dataset("in-context-recall", 8_000, 1, seed=2, vocab_size=4, seq_len=32)["train"]
    shown = (inputs[:, :-1:2] == 0).sum(axis=1)
    often = (shown >= 10) & (shown < 15)  # key 0 in two thirds of the 15 places or more, but not in all
    assert often.sum() > 500
    assert_mean(inputs[often, -1] == 0, 0.5)


def test_values_are_drawn_with_replacement():
    inputs, _ = mad.dataset("in-context-recall", 5_000, 1, seed=2, seq_len=512)["train"]
    shares = [len(set(row[1::2].tolist())) < 8 for row in inputs]  # 8 keys, all shown, on 8 values
    assert_mean(shares, 1 - math.factorial(8) / 8**8)


@pytest.mark.parametrize("reference_behaviour", [False, True])
@pytest.mark.parametrize(("noise", "seq_len"), [(0.5, 8), (0.9, 8)])
def test_noise_leaves_one_place_alone(noise, seq_len, reference_behaviour):
    """In 3 places before the last pair; the reference draws the protected one from 4."""
    changes = {"frac_noise": noise, "seq_len": seq_len, "reference_behaviour": reference_behaviour}
    inputs, _ = mad.dataset("noisy-in-context-recall", 8_000, 1, seed=1, **changes)["train"]
    pairs = (inputs[:, :-1:2] < 16).sum(axis=1)
    assert pairs.min() >= 1
    protected = 1 + 2 * (1 - noise)
    unprotected = 3 * (1 - noise) + noise**3
    assert_mean(pairs, 0.75 * protected + 0.25 * unprotected if reference_behaviour else protected)


def slow_fuzzy(rng, train, reference, vocab=16, seq_len=128, k=3, v=3):
    """One sequence of fuzzy recall, pair by pair: length, scored tokens, how often the query's pair was shown."""
    keys, values = range((vocab - 1) // 2), range((vocab - 1) // 2, vocab - 1)

    def motif(tokens, size):
        return tuple(rng.permutation(tokens)[:size].tolist())

    def key_size():
        return rng.integers(1, k + 1) if train else k

    query, answer = motif(keys, key_size()), motif(values, rng.integers(1, v + 1))
    size = len(query) + len(answer)
    earliest, value_of, shown, length, scored = rng.integers(seq_len - 2 * size), {query: answer}, [], 0, 0
    while length < seq_len - size - (k + v):
        key, value = motif(keys, key_size()), motif(values, rng.integers(1, v + 1))
        value = value_of.setdefault(key, value)
        is_last = length + len(key) + len(value) >= seq_len - size - (k + v)
        if query not in shown and (length >= earliest or (is_last and not reference)):
            key, value = query, answer
        scored += len(value) if key in shown else 0
        shown.append(key)
        length += len(key) + len(value)
    return length + size, scored + len(answer), shown.count(query)


@pytest.mark.parametrize("reference_behaviour", [False, True])
@pytest.mark.parametrize(("seq_len", "key_size"), [(48, 3), (128, 3), (48, 1)])
def test_fuzzy_recall_has_the_distribution_of_a_slow_sampler(seq_len, key_size, reference_behaviour):
    rng = np.random.default_rng(7)
    slow = [slow_fuzzy(rng, False, reference_behaviour, seq_len=seq_len, k=key_size) for _ in range(1_500)]
    changes = {"seq_len": seq_len, "k_motif_size": key_size, "reference_behaviour": reference_behaviour}
    inputs, targets = mad.dataset("fuzzy-in-context-recall", 1, 20_000, seed=1, **changes)["test"]
    lengths = (inputs != 15).sum(axis=1) + 1  # the last token is a target alone
    shown = np.array([key_runs(row)[:-1].count(key_runs(row)[-1]) for row in inputs[:4_000].tolist()])
    for ours, theirs in zip((lengths, (targets != IGNORE).sum(axis=1), shown), np.array(slow).T, strict=True):
        assert_mean(theirs, ours.mean(), slack=4 * ours.std() / math.sqrt(len(ours)))
        # The spread too: a standard deviation's standard error is 1/sqrt(2n) of it for a normal variable, 2 % here, and
        # a few times that for counts of rare events.
        assert theirs.std() == pytest.approx(ours.std(), rel=0.12)


def key_runs(row):
    """The runs of key tokens (below 7), in order; the last one is the query's key."""
    return [tuple(run) for is_key, run in itertools.groupby(row, key=lambda token: token < 7) if is_key]


@pytest.mark.parametrize(("seq_len", "measured", "error"), [(128, 0.0202, 0.0022), (48, 0.0727, 0.0041)])
def test_only_the_reference_leaves_queries_unanswerable(seq_len, measured, error):
    """Measured on 4,000 sequences that the published generator's rules gave, with the standard error."""

    def unanswerable(reference_behaviour):
        changes = {"seq_len": seq_len, "reference_behaviour": reference_behaviour}
        inputs, _ = mad.dataset("fuzzy-in-context-recall", 1, 8_000, seed=4, **changes)["test"]
        return [query not in before for *before, query in map(key_runs, inputs.tolist())]

    assert not any(unanswerable(False))
    assert_mean(unanswerable(True), measured, slack=4 * error)


@pytest.mark.parametrize(("vocab_size", "measured", "error"), [(16, 4.422, 0.037), (32, 2.185, 0.027)])
@pytest.mark.parametrize("reference_behaviour", [False, True])
def test_fuzzy_recall_scores_as_many_tokens_as_the_reference(vocab_size, measured, error, reference_behaviour):
    """Measured likewise. Planting the query always changes the mean by less than a hundredth of a token."""
    tokens = scored_tokens(
        "fuzzy-in-context-recall", 10_000, vocab_size=vocab_size, reference_behaviour=reference_behaviour
    )
    assert_mean(tokens, measured, slack=4 * error)


def test_fuzzy_motifs_repeat_no_token_and_have_the_sizes_promised():
    def first_motifs(part):
        """The first key and the first value, whose sizes nothing conditions."""
        inputs, _ = mad.dataset("fuzzy-in-context-recall", 3_000, 3_000, seed=0)[part]
        for row in inputs.tolist():
            tokens = [token for token in row if token != 15]
            key_end = next(place for place, token in enumerate(tokens) if token >= 7)
            value_end = next(place for place in range(key_end, len(tokens)) if tokens[place] < 7)
            yield tokens[:key_end], tokens[key_end:value_end]

    for part in ("train", "test"):
        motifs = list(first_motifs(part))
        assert all(len(set(motif)) == len(motif) for pair in motifs for motif in pair)
        for size in (1, 2, 3):
            assert_mean([len(value) == size for _, value in motifs], 1 / 3)
            if part == "train":
                assert_mean([len(key) == size for key, _ in motifs], 1 / 3)
        for token in range(7):
            assert_mean([token in key for key, _ in motifs], 2 / 7 if part == "train" else 3 / 7)
    assert all(len(key) == 3 for key, _ in motifs)


@pytest.mark.parametrize(("vocab_size", "measured"), [(2048, 0.988), (4096, 0.871), (8192, 0.640)])
def test_memorization_is_bounded_by_the_keys_that_training_showed(vocab_size, measured):
    data = mad.dataset("memorization", 256, 1280, seed=0, vocab_size=vocab_size)
    keys = (vocab_size - 1) // 2
    known = np.isin(data["test"][0][:, ::2], np.unique(data["train"][0][:, ::2])).mean()
    expected = 1 - (1 - 1 / keys) ** (256 * 16)
    # Keys missed by 4,096 draws are nearly independent; the test's 20,480 draws add less. The measured figures come
    # from one draw of the training set as well.
    unknown = (1 - expected) * keys
    error = math.sqrt(unknown * expected) / keys + math.sqrt(expected * (1 - expected) / 20_480)
    assert abs(known - expected) < 4 * error
    assert abs(measured - expected) < 4 * error


def test_blanks_fall_before_content_at_random():
    """223 blanks before 16 tokens: each gap is binomial(223, 1/16)."""
    inputs, _ = mad.dataset("selective-copying", 4_000, 1, seed=0)["train"]
    places = np.nonzero(inputs < 14)[1].reshape(-1, 16)
    gaps = np.diff(places, axis=1, prepend=-1) - 1
    assert (gaps.sum(axis=1) == 223).all()
    for position in range(16):
        assert_mean(gaps[:, position], 223 / 16)
        # The standard error of a variance is about sqrt(2/n) of it: 2.2 %; four of them.
        assert gaps[:, position].var() == pytest.approx(223 / 16 * 15 / 16, rel=0.09)


@pytest.mark.parametrize(("task", "content"), [("compression", 15), ("selective-copying", 14)])
def test_content_is_uniform(task, content):
    inputs, _ = mad.dataset(task, 4_000, 1, seed=0)["train"]
    counts = np.bincount(inputs[inputs < content], minlength=content)
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_squared < content - 1 + 4 * math.sqrt(2 * (content - 1))
