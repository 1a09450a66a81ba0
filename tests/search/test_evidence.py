"""The evidence tools against scipy, brute force and closed forms, and what they say where there is not enough."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.cli import main
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_search.evidence import ablation, growth, oracle, posterior, ranks, regret
from composer_search.evidence import agreement as agreements
from composer_search.evidence.scores import Scores, parameters, read_scores, scores_of
from composer_search.extrapolate import extrapolate
from composer_search.study import Space, Study, StudySettings, Trial

SPACE = Space("AM", 4)
EVERY = tuple(SPACE.at(rank) for rank in range(SPACE.size))
WORTH = np.array([sum((4 - i) * (letter == "A") for i, letter in enumerate(each)) for each in EVERY]) / 10
"""A score without noise: early attention is good; the best is 4A."""


def make(seeds: int = 3, noise: float = 0.05, worth: np.ndarray = WORTH, name: str = "made") -> Scores:
    by_seed = worth[:, None] + np.random.default_rng(0).normal(0, noise, (len(worth), seeds))
    return Scores(name, EVERY[: len(worth)], by_seed.mean(axis=1), by_seed if seeds > 1 else None)


def write_study(folder: Path, *, seeds: int = 2, count: int = 16, constant: bool = False, space: Space = SPACE) -> Path:
    """A study of the first `count` sequences in a shuffled order; two tasks whose mean is the score."""
    rng = np.random.default_rng(3)
    wanted = StudySettings(
        space=space, proposer="random", initial=5, seed=0, budget=space.size, evaluator={"name": "x"}
    )
    order = random.Random(1).sample(range(space.size), count)
    with Study.open(folder, wanted) as study:
        for number, rank in enumerate(order):
            sequence = space.at(rank)
            worth = sum((4 - i) * (letter == "A") for i, letter in enumerate(sequence)) / 10
            scores = [0.5 if constant else worth + rng.normal(0, 0.05) for _ in range(seeds)]
            mean = float(np.mean(scores))
            study.record(
                Trial(
                    trial=number,
                    sequence=sequence,
                    proposer="random",
                    seconds=2.0,
                    finished="2026-01-01T00:00:00+00:00",
                    score=mean,
                    spread=float(np.std(scores, ddof=1)) if seeds > 1 else 0.0,
                    seed_scores=tuple(scores),
                    tasks={"one": mean + 0.1, "two": mean - 0.1},
                )
            )
    return folder


# Rank correlations

values = st.lists(st.integers(-3, 3), min_size=5, max_size=14)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_correlations_equal_scipy_with_ties_and_resamples(data):
    x = np.array(data.draw(values), dtype=float)
    y = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=len(x), max_size=len(x))), dtype=float)
    drawn = np.random.default_rng(0).integers(len(x), size=(4, len(x)))
    drawn[0] = np.arange(len(x))
    weights = np.array([np.bincount(row, minlength=len(x)) for row in drawn], dtype=float)
    for ours, theirs in ((ranks.spearman, scipy.stats.spearmanr), (ranks.kendall, scipy.stats.kendalltau)):
        with np.errstate(all="ignore"):
            expected = [
                math.nan if min(np.ptp(x[row]), np.ptp(y[row])) == 0 else theirs(x[row], y[row]).statistic
                for row in drawn
            ]
        assert ours(x, y, weights) == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert ours(x, y) == pytest.approx(expected[:1], abs=1e-9, nan_ok=True)


def test_bootstrap_interval_covers_what_it_should():
    """Over many samples of a population of known rho, some 95 % of the intervals hold it; 0.88 is 4 sd below."""
    rng, true, hits = np.random.default_rng(1), 0.6, 0
    pearson = 2 * math.sin(math.pi * true / 6)
    for sample in range(100):
        x, noise = rng.normal(size=(2, 40))
        found = ranks.correlation("spearman", x, pearson * x + math.sqrt(1 - pearson**2) * noise, seed=sample)
        hits += found.low <= true <= found.high
    assert 0.87 <= hits / 100 <= 1.0


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3, 4], [1, 2, 3, 4]), ([1] * 9, range(9)), (range(9), [0.5] * 9)])
def test_too_few_or_equal_values_have_no_correlation(x, y):
    assert ranks.correlation("spearman", np.array(x, float), np.array(y, float)) is None
    assert ranks.correlation("kendall", np.array(x, float), np.array(y, float)) is None


def test_resamples_in_portions_are_those_in_one_piece(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 20))
    weights = ranks.bootstrap_weights(20, 0, 50)
    whole = ranks.resampled("kendall", x, y, weights)
    monkeypatch.setattr(ranks, "_CHUNK", 60)
    assert ranks.resampled("kendall", x, y, weights) == pytest.approx(whole, abs=1e-12)


# The oracle


def test_oracle_ranks_and_measures_noise():
    """Noise and spread are those of the generator, the ceiling the correlation with the truth (3 sd of 40 studies)."""
    rng = np.random.default_rng(5)
    truth = rng.normal(0, 0.1, 200)
    sequences = tuple(Space("AM", 8).at(rank) for rank in range(200))
    by_seed = truth[:, None] + rng.normal(0, 0.1, (200, 4))
    found = oracle.oracle(Scores("made", sequences, by_seed.mean(axis=1), by_seed), resamples=200)
    assert found.within == pytest.approx(0.1, rel=0.12) and found.between == pytest.approx(truth.std(), rel=0.15)
    assert list(found.scores.values) == sorted(by_seed.mean(axis=1), reverse=True)
    assert found.wins.sum() == pytest.approx(1) and found.wins[0] > 0
    measured = scipy.stats.spearmanr(truth, by_seed.mean(axis=1)).statistic
    assert found.ceiling.ceiling == pytest.approx(measured, abs=0.05)
    pairs = [
        scipy.stats.spearmanr(by_seed[:, a], by_seed[:, b]).statistic for a, b in itertools.combinations(range(4), 2)
    ]
    assert found.ceiling.single.value == pytest.approx(np.mean(pairs))
    assert found.ceiling.repeat == pytest.approx(4 * np.mean(pairs) / (1 + 3 * np.mean(pairs)))
    assert found.ceiling.halves == pytest.approx(found.ceiling.repeat, abs=0.05)


def test_resampled_means_have_the_standard_error_of_the_mean():
    by_seed = make(seeds=2, noise=0.1).seeds
    spread = oracle.resampled_means(by_seed, 0, 4000).std(axis=0)
    expected = by_seed.std(axis=1, ddof=1) / math.sqrt(2)
    assert spread == pytest.approx(expected, rel=0.06)  # the standard error of 4000 two-point draws is below 2 %


def test_without_noise_the_winner_always_wins():
    found = oracle.oracle(make(noise=0.0))
    assert found.scores.sequences[0] == CompositeSequence("AAAA") and found.wins[0] == 1
    assert found.ceiling.ceiling == pytest.approx(1) and found.within == pytest.approx(0)


def test_oracle_says_what_is_not_enough():
    with pytest.raises(UsageError, match="two seeds"):
        oracle.oracle(make(seeds=1))
    with pytest.raises(UsageError, match="one candidate"):
        oracle.oracle(make(worth=WORTH[:1]))
    few = oracle.oracle(make(worth=WORTH[:3]))
    assert few.ceiling is None and "Not enough" in " ".join(few.exhibit().findings)
    flat = oracle.oracle(make(noise=0.0, worth=np.full(16, 0.5)))
    assert flat.ceiling is None and flat.wins == pytest.approx(np.full(16, 1 / 16))
    chance = oracle.noise_ceiling(np.stack([np.arange(9.0), -np.arange(9.0)], axis=1))
    assert chance.ceiling == 0 and chance.repeat == pytest.approx(-1)


# Agreement


def test_agreement_is_of_the_common_candidates_and_beats_size_or_not():
    target = make(noise=0.01)
    order = [3, 1, 0, 2, 9, 8, 14, 15, 12, 5]
    found = agreements.agreement(replace(target.at(order), name="proxy"), replace(target, values=-target.values))
    assert found.candidates == 10 and found.spearman.value == pytest.approx(-1)
    sizes = parameters(target.sequences)
    good = agreements.agreement(make(noise=0.02, name="proxy"), target)
    assert good.by_parameters.value == pytest.approx(scipy.stats.spearmanr(sizes, target.values).statistic)
    assert good.kendall.value == pytest.approx(scipy.stats.kendalltau(make(noise=0.02).values, target.values).statistic)
    assert good.gain.value == pytest.approx(good.spearman.value - good.by_parameters.value)
    assert "ranks better." in good.verdict and good.over_seeds.low <= good.spearman.value
    bigger_is_better = Scores("target", EVERY, sizes + np.arange(16))
    worse = agreements.agreement(Scores("proxy", EVERY, -sizes + np.arange(16)), bigger_is_better)
    assert "ranks worse" in worse.verdict
    assert "to beat" in agreements.size_agreement(target).verdict


def test_where_the_smallest_are_the_best_the_verdict_says_so():
    """Attention is good here, and an MLP is the bigger block: the count turned round ranks almost perfectly."""
    share = np.array([each.count("A") / len(each) for each in EVERY])
    noisy, exact = make(worth=share, noise=0.35, name="noisy"), make(worth=share, noise=0.01, name="exact")
    (found,) = agreements.compare(noisy, exact)[:1]
    assert found.by_parameters.value < -0.9 and "not than the parameter count turned round" in found.verdict
    (found,) = agreements.compare(make(worth=-share, noise=0.35), make(worth=-share, noise=0.01, name="exact"))[:1]
    assert found.by_parameters.value > 0.9 and "turned round" not in found.verdict


def test_agreement_says_what_is_not_enough():
    scores = make()
    with pytest.raises(UsageError, match=r"no sequence is in both: made holds 16 of 4 blocks"):
        agreements.agreement(scores, Scores("other", (CompositeSequence("AMAM" * 4),), np.ones(1)))
    few = agreements.agreement(replace(scores.at([0, 1, 2]), name="few"), scores)
    assert few.spearman is None and "not enough" in few.verdict and "3 candidates" in few.verdict
    flat = agreements.agreement(Scores("flat", EVERY, np.ones(16)), scores)
    assert flat.spearman is None and "all equal" in flat.verdict
    assert "same numbers" in agreements.agreement(scores, scores).verdict
    same_size = [rank for rank, each in enumerate(EVERY) if each.count("A") == 2]
    found = agreements.agreement(make(noise=0.02, name="proxy").at(same_size), scores.at(same_size))
    assert found.by_parameters is None and "as many parameters" in found.verdict
    assert all(cell is not None or index > 4 for index, cell in enumerate(found.row()))


def test_tasks_are_compared_with_the_others():
    tasks = {"one": WORTH, "two": WORTH[::-1].copy(), "three": WORTH * 3}
    found = agreements.task_agreements(replace(make(), tasks=tasks))
    assert [each.proxy for each in found] == list(tasks)
    assert found[1].spearman.value == pytest.approx(-1) and found[0].spearman.value == pytest.approx(1)
    assert agreements.task_agreements(replace(make(), tasks={"one": WORTH})) == []


# Scores from files


def test_scores_of_trials_and_tables(tmp_path):
    trials = Study.load(write_study(tmp_path / "study")).trials
    again = replace(trials[0], trial=99, score=9.0)
    failed = Trial(trial=98, sequence=EVERY[0], proposer="x", seconds=1, finished="", error="no")
    scores = scores_of("all", [failed, *trials, again])
    assert len(scores) == 16 and scores.values.max() < 2 and scores.seeds.shape == (16, 2)
    assert set(scores.tasks) == {"one", "two"}
    assert scores_of("uneven", [trials[0], replace(trials[1], seed_scores=(1.0,), tasks={})]).seeds is None
    assert len(scores_of("none", [])) == 0
    (tmp_path / "t.json").write_text('{"2A2M": 0.5, "AMAM": 1}')
    assert read_scores(tmp_path / "t.json").values.tolist() == [0.5, 1.0]
    for text, words in (
        ('{"2X": 1}', "2X"),
        ('{"2A": NaN}', "finite"),
        ('{"2A": 1, "AA": 2}', "twice"),
        ("[]", "object"),
    ):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(FileError, match=words):
            read_scores(tmp_path / "t.json")


# Regret


def test_random_regret_equals_its_expectation_and_brute_force(tmp_path):
    """Brute force over all draws of 2 of 4; replays within 4 standard errors of the exact mean."""
    four = np.array([0.1, 0.4, 0.3, 0.4])
    pairs = [0.4 - max(pair) for pair in itertools.combinations(four, 2)]
    assert regret.expected_random_regret(four, 4) == pytest.approx([0.1, np.mean(pairs), 0, 0])
    study = Study.load(write_study(tmp_path / "study"))
    found = regret.regret(study, proposers=("random",), replays=200, budget=16)
    (replay,) = found.replays
    error = replay.regret.std(axis=0) / math.sqrt(200)
    assert (np.abs(replay.regret.mean(axis=0) - found.expected_random) <= 4 * error + 1e-9).all()
    assert replay.regret[:, -1] == pytest.approx(np.zeros(200))
    assert (np.diff(replay.regret, axis=1) <= 1e-12).all()


def test_noisy_regret_is_judged_by_the_other_seeds(tmp_path):
    study = Study.load(write_study(tmp_path / "study"))
    scores = scores_of("x", study.trials)
    found = regret.regret(study, proposers=("random",), replays=2, budget=16, noisy=True)
    for number in (0, 1):
        chosen = scores.seeds[:, number].argmax()
        truth = scores.seeds[:, 1 - number]
        assert found.replays[0].regret[number, -1] == pytest.approx(truth.max() - truth[chosen])
    assert found.expected_random is None and "other seeds" in " ".join(found.exhibit().findings)


def test_regret_says_what_is_not_enough(tmp_path):
    part = Study.load(write_study(tmp_path / "part", count=5))
    with pytest.raises(UsageError, match=r"5 of its 16 sequences; search with --budget 16"):
        regret.regret(part)
    study = Study.load(write_study(tmp_path / "one", seeds=1))
    with pytest.raises(UsageError, match="two seeds"):
        regret.regret(study, noisy=True, replays=1)
    with pytest.raises(UsageError, match="nobody is left out: unknown proposer"):
        regret.regret(study, proposers=("nobody",))
    found = regret.regret(study, proposers=("nobody", "random"), replays=1, budget=2)
    assert [each.proposer for each in found.replays] == ["random"] and "nobody" in " ".join(found.exhibit().findings)
    for wrong in ({"replays": 0}, {"budget": 0}, {"budget": 17}):
        with pytest.raises(UsageError, match="expected at least 1 replay"):
            regret.regret(study, **wrong)


# The aggregator's ablation


def test_ablation_rules_choose_what_they_are_named_for():
    scores = make(noise=0.0)
    found = ablation.ablate(scores, size=16, draws=2, clusters=(3,), gaussian_process=False)
    rules = {each.rule: each for each in found.rules}
    assert set(rules) == {"best trial", "all trials vote, N_0", *(f"3 clusters, {n}" for n in ("N_0", "N_1", "N_all"))}
    assert rules["best trial"].ranks.tolist() == [1, 1] and str(rules["best trial"].most_frequent) == "4A"
    every = rules["all trials vote, N_0"]  # half of all sequences have A at any position: a tie, which the mean decides
    assert str(every.most_frequent) == "4A"
    assert found.best == pytest.approx(WORTH.max()) and not found.noisy
    assert [each.known.mean() for each in found.rules] == sorted((e.known.mean() for e in found.rules), reverse=True)


def test_noisy_ablation_shows_one_seed_and_judges_by_the_others():
    scores = make(seeds=3, noise=0.2)
    found = ablation.ablate(scores, size=16, draws=3, clusters=(2,), noisy=True, gaussian_process=False)
    best = next(each for each in found.rules if each.rule == "best trial")
    for number in range(3):
        others = np.delete(scores.seeds, number, axis=1).mean(axis=1)
        chosen = scores.seeds[:, number].argmax()
        assert best.scores[number] == pytest.approx(others[chosen])
        assert best.ranks[number] == 1 + (others > others[chosen]).sum()


def test_ablation_says_what_is_not_enough():
    scores = make()
    for wrong in ({"size": 1}, {"size": 17}, {"draws": 0}):
        with pytest.raises(UsageError, match="expected 2 to 16 trials"):
            ablation.ablate(scores, **wrong)
    flat = ablation.ablate(make(noise=0.0, worth=np.full(16, 0.5)), draws=1)
    assert all(each.known.tolist() == [0.5] for each in flat.rules)
    part = scores.at([0, 3, 12])
    found = ablation.ablate(part, size=3, draws=2, clusters=(1,), gaussian_process=True)
    assert "left out" in " ".join(found.missing)
    assert "nan" not in json.dumps(found.as_dict()).lower()


def test_posterior_recovers_an_additive_function_and_its_mode_is_the_rule():
    rows = [*range(0, 16, 2), 15, 1, 7]
    belief = posterior.fit_posterior([EVERY[row] for row in rows], WORTH[rows], EVERY)
    assert belief.mean == pytest.approx(WORTH, abs=0.1) and (belief.deviation >= 0).all()
    assert EVERY[int(belief.mean.argmax())] == CompositeSequence("AAAA")
    with pytest.raises(UsageError, match="not all equal"):
        posterior.fit_posterior(EVERY, np.ones(16), EVERY)
    with pytest.raises(UsageError, match="several lengths"):
        posterior.fit_posterior(EVERY, WORTH, [CompositeSequence("A")])


# Growth


def test_growth_counts_are_those_of_the_architectures():
    sequence, shape = CompositeSequence.parse("2A5M2A3M1A3M"), PRESETS["1b"]
    stretched = extrapolate(sequence, shape, method="stretch")
    found = growth.grow_both(sequence, shape, runs=[(stretched, 0.9), (stretched, 0.92)])
    rows = {row[0]: row for row in found.exhibit().rows}
    assert rows["stretched"][2:5] == (29, 10, 19) and rows["baseline"][2:5] == (32, 16, 16)
    assert rows["stretched"][5] == stretched.params_non_embedding and rows["stretched"][-1] == "0.9000, 0.9200"
    assert rows["stacked"][-1] is None and "stacked" in found.architectures
    with pytest.raises(UsageError, match="a run trained 2A at shape 8b"):
        wrong = replace(stretched, sequence=CompositeSequence("AA"), shape=PRESETS["8b"])
        growth.grow_both(sequence, shape, runs=[(wrong, 1.0)])


# The commands


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        main(list(arguments))
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    return status, *capsys.readouterr()


def test_every_command_prints_json_and_draws_one_page(tmp_path, capsys):
    study = str(write_study(tmp_path / "study"))
    commands = {
        "oracle": [study],
        "regret": [study, "--proposers", "random", "--replays", "2"],
        "agreement": [study],
        "ablation": [study, "--draws", "2", "--clusters", "2"],
        "votes": [study, "--resamples", "3"],
        "growth": ["2A4M", "--shape", "1b"],
    }
    for name, arguments in commands.items():
        page = tmp_path / f"{name}.html"
        status, printed, _ = run(capsys, "evidence", name, *arguments, "--output", str(page), "--json")
        assert status == 0 and isinstance(json.loads(printed), dict)
        text = page.read_text()
        assert "<figure>" in text and ">nan" not in text.lower() and 'value="nan"' not in text
    status, printed, _ = run(capsys, "evidence", "agreement", study)
    assert status == 0 and "parameter count" in printed and (Path(study) / "evidence/agreement.html").exists()


def test_agreement_with_a_target_keeps_the_page_without_one(tmp_path, capsys):
    study, other = (str(write_study(tmp_path / name)) for name in ("study", "other.v2"))
    scores = tmp_path / "losses.json"
    scores.write_text(json.dumps({str(sequence): float(worth) for sequence, worth in zip(EVERY, WORTH, strict=True)}))
    for target in ([], ["--target", other], ["--target", str(scores)]):
        status, printed, _ = run(capsys, "evidence", "agreement", study, *target)
        assert status == 0
    pages = {"agreement.html", "agreement-other.v2.html", "agreement-losses.html"}
    assert {page.name for page in (Path(study) / "evidence").iterdir()} == pages
    assert "agreement-losses.html" in printed


@pytest.mark.parametrize("name", ["oracle", "regret", "agreement", "ablation", "votes"])
@pytest.mark.parametrize(("count", "seeds", "constant"), [(0, 1, False), (1, 2, False), (6, 1, False), (16, 2, True)])
def test_poor_studies_end_in_a_message(tmp_path, capsys, name, count, seeds, constant):
    study = str(write_study(tmp_path / "study", count=count, seeds=seeds, constant=constant))
    few = ["--draws", "1"] if name == "ablation" else []
    few += ["--resamples", "2"] if name == "votes" else []
    few += ["--proposers", "random", "--replays", "1"] if name == "regret" else []
    page = tmp_path / "page.html"
    status, printed, error = run(capsys, "evidence", name, study, *few, "--output", str(page), "--json")
    assert "Traceback" not in error and "nan" not in printed.lower()
    if status:
        assert error.startswith("composer-megatron: ") and not page.exists()
    else:
        assert ">nan" not in page.read_text().lower()


@pytest.mark.parametrize("name", ["oracle", "agreement", "ablation", "votes"])
def test_negative_seeds_are_one_message(tmp_path, capsys, name):
    study = str(write_study(tmp_path / "study"))
    status, _, error = run(capsys, "evidence", name, study, "--seed", "-1", "--output", str(tmp_path / "page.html"))
    assert status == 2 and "seed=-1; expected 0 or more" in error and "Traceback" not in error


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(posterior, "available", lambda: False)
    with pytest.raises(ComposerError, match=r"composer-megatron\[search\]"):
        posterior.fit_posterior(EVERY, WORTH, EVERY)
