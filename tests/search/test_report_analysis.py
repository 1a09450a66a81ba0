"""The report's analyses: fronts, costs and ranks against recomputed ones, and pages of studies that hold too little."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_search.evidence.ranks import correlation
from composer_search.evidence.scores import parameters, scores_of
from composer_search.extrapolate import extrapolate
from composer_search.objectives import Target
from composer_search.report import ReportInputs, build_report
from composer_search.report.data import read_study

ENVIRONMENT = {"python": "3.12"}


def write_study(
    folder: Path, scores: list[list[float]], *, tasks: int = 2, bayesian: bool = False, **settings: object
) -> Path:
    """A study with a trial for each row of seed scores, and one that failed."""
    folder.mkdir()
    head = {"format": "composer-study", "version": 1, "space": {"primitives": "AM", "length": 6}, "budget": 40}
    (folder / "study.json").write_text(json.dumps(head | settings))
    ranks = random.Random(2).sample(range(64), len(scores))
    lines = []
    for number, (rank, seeds) in enumerate(zip(ranks, scores, strict=True)):
        mean = float(np.mean(seeds))
        line = {"trial": number, "sequence": f"{rank:06b}".translate({48: "A", 49: "M"}), "status": "completed"}
        line |= {"score": mean, "spread": 0.0, "seed_scores": seeds, "seconds": 10.0 + number}
        lines.append(line | {"tasks": {f"task-{task}": mean + task * seeds[0] for task in range(tasks)}})
    lines.append({"trial": len(scores), "sequence": "6M", "status": "failed", "error": "no", "seconds": 1.0})
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if bayesian:
        (folder / "ax.json").write_text("{}")
    return folder


def random_scores(count: int, seeds: int = 2) -> list[list[float]]:
    return np.random.default_rng(4).uniform(0.3, 0.9, (count, seeds)).tolist()


def page_of(folder: Path, **inputs: object) -> str:
    return build_report(ReportInputs(study=folder, environment=ENVIRONMENT, **inputs))


def section(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', page, re.S)[0]


def front(page: str) -> dict[str, str]:
    """Sequences of the table of fronts, and of which."""
    table = re.search(r"<caption>Pareto fronts</caption>.*?</table>", page, re.S)[0]
    rows = re.findall(r'<tr><th scope="row"><span class="sequence">(\w+)</span>.*?<td>([^<]*)</td></tr>', table)
    return {str(CompositeSequence.parse(text)): where for text, where in rows}


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({}, Target(shape=PRESETS["1b"])),
        (
            {"target": Target(shape=PRESETS["8b"], method="stretch").as_dict()},
            Target(shape=PRESETS["8b"], method="stretch"),
        ),
        ({"target": {"of": "tomorrow"}}, Target(shape=PRESETS["1b"])),
    ],
)
def test_pareto_front_is_that_of_brute_force(tmp_path, settings, target):
    study = write_study(tmp_path / "study", random_scores(40), **settings)
    scored = {trial.sequence: score for trial, score in read_study(study).scored}
    costs = {each: target.grow(each).kv_bytes_per_token() for each in scored}
    unbeaten = {
        str(each)
        for each in scored
        if not any(
            costs[other] <= costs[each]
            and scored[other] >= scored[each]
            and (costs[other], scored[other]) != (costs[each], scored[each])
            for other in scored
        )
    }
    found = front(page_of(study))
    assert {name for name, where in found.items() if "KV-cache" in where} == unbeaten
    text = section(page_of(study), "pareto")
    assert f"shape {target.shape.name}" in text and text.count('<svg class="chart low"') == 3


def test_pareto_takes_the_shape_of_the_page_and_leaves_out_what_does_not_fit(tmp_path):
    study = write_study(tmp_path / "study", random_scores(30))
    extrapolate(CompositeSequence("AM"), PRESETS["tiny"]).save(tmp_path / "a.json")
    text = section(page_of(study, architectures={"a": tmp_path / "a.json"}), "pareto")
    big = sum(
        Architecture(trial.sequence, PRESETS["tiny"]).matrix_parameters
        > Architecture(trial.sequence, PRESETS["tiny"]).baseline().matrix_parameters
        for trial, _ in read_study(study).scored
    )
    assert "shape tiny" in text and (f"{big} sequences are bigger" in text) == (big > 0) and big > 0


def test_agreements_on_the_page_are_those_of_the_trials(tmp_path):
    study = write_study(tmp_path / "study", random_scores(40))
    text = section(page_of(study), "tasks")
    scores = scores_of("x", read_study(study).trials)
    sizes = correlation("spearman", parameters(scores.sequences), scores.values)
    tasks = correlation("spearman", scores.tasks["task-0"], scores.tasks["task-1"])
    assert f"parameter count against the score: Spearman {sizes}: what any proxy has to beat." in text
    assert f"task-0 against mean of the other tasks: Spearman {tasks}" in text
    assert text.count('class="place"') >= 2 * 40 + 4


def test_cost_so_far_and_to_go(tmp_path):
    text = section(page_of(write_study(tmp_path / "study", random_scores(20))), "effort")
    seconds = [*range(10, 30), 1]
    values = [float(value) for value in re.findall(r'<data value="([^"]+)"', text)]
    spent, mean = sum(seconds) / 3600, sum(seconds) / 21
    assert values == pytest.approx([21, 1, 19, 29, spent, 40 - 21, (40 - 21) * mean / 3600])


def test_the_gaussian_process_of_a_bayesian_search_is_shown(tmp_path):
    text = section(page_of(write_study(tmp_path / "study", random_scores(12), bayesian=True)), "uncertainty")
    assert "What the Gaussian process believes" in text and "not tried" in text and "of 64" in text


@pytest.mark.parametrize("bayesian", [False, True])
@pytest.mark.parametrize(
    "scores",
    [
        [],
        [[0.5, 0.6]],
        [[0.5]],
        [[0.5, 0.5]] * 20,
        [[0.4], [0.6]],
        [[0.5], [0.5, 0.6], [0.1]],
        random_scores(3),
        [[0.0, 0.0]] * 6,
    ],
)
def test_poor_studies_say_what_is_not_enough(tmp_path, scores, bayesian):
    page = page_of(write_study(tmp_path / "study", scores, bayesian=bayesian, tasks=len(scores) % 3))
    body = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page, flags=re.S)
    assert not re.search(r"\bnan\b|\binf\b|None|Traceback", body)
    if len({tuple(seeds) for seeds in scores}) < 5:
        assert re.search("not enough|Not enough|no scored trial|no rank|not known", body)
    assert 'id="effort"' in body
