"""The report: its numbers are those of the files, nothing breaks the page, and what is absent is said."""

import itertools
import json
import math
import platform
import re
import shutil
from dataclasses import replace
from importlib import metadata

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_search.report import ReportInputs, build_report, write_report
from composer_search.report.data import read_run
from tests.search.report_demo import (
    HOSTILE,
    UNIGRAM,
    VALID,
    Node,
    hostile,
    numbers,
    parse,
    rows,
    section,
    trial_lines,
    write_all,
    write_lines,
)

ANALYSES = {"pareto", "tasks", "uncertainty", "effort"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ReportInputs:
    return write_all(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def page(inputs: ReportInputs) -> Node:
    return parse(build_report(inputs))


def percent(node: Node, name: str) -> float:
    text = node.attributes[name] or ""
    assert text.endswith("%")
    return float(text[:-1])


# The page as HTML


def test_is_well_formed(page):
    ids = [node.attributes["id"] for node in page.every() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    assert {node.attributes["aria-labelledby"] for node in page.all("section")} <= set(ids)
    links = [node.attributes["href"] for node in page.all("a")]
    assert len(links) == 12 and all(link[0] == "#" and link[1:] in ids for link in links)
    assert len(page.all("h1")) == 1 and len(page.all("title")) >= 1
    for drawing in (node for node in page.all("svg") if node.attributes.get("role") == "img"):
        assert drawing.attributes["aria-label"]


def test_loads_nothing(inputs):
    text = build_report(inputs)
    assert not re.findall(r"""\b(src|srcset|poster|action)=|url\(|@import|<link|<iframe|\bfetch\(|XMLHttp""", text)
    assert set(re.findall(r"https?://[^\"\s<]*", text)) == {"http://www.w3.org/2000/svg"}


def test_hostile_text_stays_text(inputs, tmp_path):
    write_report(hostile(inputs, tmp_path), tmp_path / "report.html")
    page = parse((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not [node for node in page.every() if any(name.startswith("on") for name in node.attributes)]
    written = [each.text for each in section(page, "samples").all("pre")]
    assert all(f"{each}\ufffd\ufffd\ufffd \ufffd{each}" in written for each in HOSTILE)
    for name in HOSTILE:
        assert name in section(page, "sequences").text and name in section(page, "training").text


# The numbers


def test_shown_numbers_are_their_exact_values_rounded(page):
    shown = page.all("data")
    assert len(shown) > 150
    for data in shown:
        text = data.text.replace(",", "").replace("−", "-")
        unit = 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text) - float(data.attributes["value"])) <= 0.5001 * unit, data.text


def test_trials_table(page):
    lines = {line["trial"]: line for line in trial_lines(3)}
    table = rows(page, "Trials of the study")
    assert len(table) == len(lines)
    scores = []
    for cells in table:
        line = lines.pop(int(cells[0].values[0]))
        assert CompositeSequence.parse(cells[1].all("span", "sequence")[0].text) == CompositeSequence.parse(
            line["sequence"]
        )
        if line["status"] == "failed":
            assert cells[2].text == "failed" and not numbers(cells[2:])
            continue
        expected = [line["score"], line["spread"], line["test_score"], *line["tasks"].values()]
        assert [value for cell in cells[2:-2] for value in cell.values] == expected
        assert (cells[-2].text, cells[-1].values) == (line["proposer"], [line["seconds"]])
        scores += cells[2].values
    assert not lines and scores == sorted(scores, reverse=True)
    assert "Trial 11, 6M: loss is <NaN> at step 12" in section(page, "search").text


@pytest.mark.parametrize("goals", [1, 2])
def test_an_objective_ranks_and_stands_beside_the_score(inputs, tmp_path, goals):
    """Values fall where scores rise, so that no order by score could pass for one by value."""
    shutil.copytree(inputs.study, tmp_path / "study", ignore=shutil.ignore_patterns("aggregate.json"))
    names = ["value"] if goals == 1 else ["goal_1", "goal_2"]
    lines = trial_lines(3)
    for line in lines:
        if "score" in line:
            line["objective"] = {"kv_bytes": 1.5} | {name: -place - line["score"] for place, name in enumerate(names)}
    write_lines(tmp_path / "study/trials.jsonl", lines)
    settings = json.loads((inputs.study / "study.json").read_text()) | {"objective": "accuracy - 0.2 kv_bytes"}
    (tmp_path / "study/study.json").write_text(json.dumps(settings))
    page = parse(build_report(ReportInputs(study=tmp_path / "study")))
    table = [cells for cells in rows(page, "Trials of the study") if cells[2 + goals].text != "failed"]
    scores = [cells[2 + goals].values[0] for cells in table]
    assert scores == sorted(scores)
    assert [cells[2].values[0] for cells in table] == [-score for score in scores]
    text = section(page, "search").text
    assert "Ranked by the objective accuracy - 0.2 kv_bytes" in text and ("2 goals the first" in text) == (goals == 2)
    worst = min((line for line in lines if "score" in line), key=lambda line: line["score"])
    notation = CompositeSequence.parse(worst["sequence"]).notation
    assert notation in page.all("h1")[0].text


def test_cost_table(page, inputs):
    table = {cells[0].children[0]: cells for cells in rows(page, "Costs")}
    assert set(table) == {"deep", "composite", "baseline", "Llama baseline, 8b"}
    paths = {"deep": inputs.architectures["deep"]}
    paths |= {name: folder / "architecture.json" for name, folder in inputs.runs.items()}
    for name, path in paths.items():
        architecture = Architecture.load(path)
        counts, baseline = architecture.summary(256), architecture.baseline()
        cells = [cell.values for cell in table[name][1:]]
        assert CompositeSequence.parse(table[name][0].all("small")[0].text) == architecture.sequence
        keys = ("blocks", "params_non_embedding", "params_total", "flops_per_token", "kv_bytes_per_token")
        assert [values[0] for values in cells] == [counts[key] for key in keys]
        if name != "baseline":
            excess = (counts["params_total"] / baseline.params_total - 1) * 100
            ratios = [pytest.approx(excess), counts["flops_ratio"], counts["kv_ratio"]]
            assert [values[1] for values in cells[2:]] == ratios
    eight = Architecture.load(inputs.architectures["deep"]).baseline()
    assert table["Llama baseline, 8b"][2].values == [eight.params_non_embedding]


def test_evaluation_and_headline(page, inputs):
    table = {cells[0].children[0]: cells for cells in rows(page, "Held-out loss")}
    for name, folder in inputs.runs.items():
        values = json.loads((folder / "eval.json").read_text())
        keys = ("bits_per_byte", "nats_per_token", "perplexity", "iteration", "tokens", "bytes")
        assert numbers(table[name][1:]) == [values[key] for key in keys]
        assert values["bits_per_byte"] in page.all("header")[0].values
        assert values["nats_per_token"] in page.all("header")[0].values
    unigram = [UNIGRAM["unigram_bits_per_byte"], UNIGRAM["unigram_nats_per_token"], VALID["tokens"], VALID["bytes"]]
    assert numbers(table["unigram model"][1:]) == unigram
    widths = [float(cells[2].all("span")[0].attributes["style"][6:-1]) for cells in table.values()]
    bits = [cells[1].values[0] for cells in table.values()]
    assert widths == pytest.approx([100 * each / max(bits) for each in bits], abs=0.01)
    gap = (bits[0] - bits[1], 100 * (3_079_488 / 2_926_272 - 1))
    note = next(each for each in section(page, "training").all("p", "note") if "minus" in each.text)
    assert note.values[0] == pytest.approx(gap[0]) and "One seed each" in note.text


def test_validation_votes_plan_and_settings(page, inputs):
    table = rows(page, "Validation loss, nats per token")
    curves = [read_run(name, folder).validation for name, folder in inputs.runs.items()]
    expected = [[step, loss, other] for (step, loss), (_, other) in zip(*curves, strict=True)]
    assert [[value for cell in cells for value in cell.values] for cells in table] == expected
    aggregate = json.loads((inputs.study / "aggregate.json").read_text())
    marks = [(node.all("title")[0].text, node.all("text")) for node in section(page, "vote").all("g", "vote")]
    for position, vote in enumerate(aggregate["votes"], start=1):
        for letter, count in vote.items():
            assert (f"Position {position}: {count} for {letter}" in dict(marks)) == (count > 0)
    assert [text.text for title, (text,) in marks if title.startswith("Position 1:")] == [
        str(count) for count in aggregate["votes"][0].values() if count
    ]
    assert section(page, "vote").text.count("unseen") == 1
    assert [cells[2].values[0] for cells in rows(page, "Sequences that vote")] == aggregate["member_scores"]
    assert [numbers(cells[2:]) for cells in rows(page, "Pipeline stages")] == [
        [9_660_672, 2_298_816, 41_378_688, 40_239_104]
    ] * 2
    found = {row.nodes[0].text: row.nodes[1].text for dl in section(page, "settings").all("dl") for row in dl.nodes}
    assert found["evaluator.learning_rate"] == "0.0015" and found["packages.torch"] == "2.11.0"
    assert found["valid.tokens"] == "164,210" and "packages.apex" not in found and found["gpus"] == "none"


# The drawings


def line_through(points: list[tuple[float, float]]) -> tuple[float, float]:
    (a, p), (b, q) = min(points), max(points)
    return (q - p) / (b - a), p - a * (q - p) / (b - a)


def test_trials_chart_is_to_scale(page):
    chart = section(page, "search").all("svg", "chart")[0]
    lines = {line["trial"]: line for line in trial_lines(3) if "score" in line}
    places = {}
    for place in chart.all("svg", "place"):
        number = int(re.match(r"Trial (\d+):", place.all("title")[0].text)[1])
        places[number] = (percent(place, "x"), percent(place, "y"))
    assert places.keys() - lines.keys() == {11}
    points = [(lines[number]["score"], y) for number, (_, y) in places.items() if number in lines]
    slope, offset = line_through(points)
    assert slope < 0 and all(y == pytest.approx(slope * score + offset, abs=2e-3) for score, y in points)
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in places.values())
    steps = [x for _, (x, _) in sorted(places.items())]
    assert all(b - a == pytest.approx(steps[1] - steps[0], abs=2e-3) for a, b in itertools.pairwise(steps))
    whiskers = [(percent(each, "y2") - percent(each, "y1")) / 2 for each in chart.all("line", "whisker")]
    assert whiskers == pytest.approx([slope * line["spread"] for line in lines.values()], abs=2e-3)
    levels = [float(level) for level in re.findall(r"V([\d.]+)", chart.all("path", "best")[0].attributes["d"])]
    best = itertools.accumulate((line["score"] for line in lines.values()), max)
    assert levels == pytest.approx([slope * score + offset for score in best], abs=2e-3)
    assert len(chart.all("circle", "ring")) == 8 and len(chart.all("circle", "member")) >= 5


def test_loss_chart_holds_the_curves(page, inputs):
    chart = section(page, "training").all("svg", "chart")[0]
    series = {line["name"]: line["points"] for line in json.loads(chart.attributes["data-series"])["series"]}
    for name, folder in inputs.runs.items():
        run = read_run(name, folder)
        assert [tuple(point) for point in series[f"{name}, training"]] == list(run.training)
        assert [tuple(point) for point in series[f"{name}, validation"]] == list(run.validation)
    path = chart.all("path", "validation")[0].attributes["d"]
    drawn = [tuple(map(float, point)) for point in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    given_points = series["composite, validation"]
    slope, offset = line_through([(loss, y) for (_, loss), (_, y) in zip(given_points, drawn, strict=True)])
    height = percent(chart.all("line", "unigram")[0], "y1")
    assert height == pytest.approx(slope * UNIGRAM["unigram_nats_per_token"] + offset, abs=0.01)


def test_strips_show_every_block_at_one_scale(page):
    bars = {bar.all("strong")[0].text: bar for bar in section(page, "sequences").all("div", "bar")}
    assert list(bars) == ["Found", "Aggregated", "deep", "composite", "baseline", "Llama baseline, 8b"]
    for bar in bars.values():
        sequence = CompositeSequence.parse(bar.all("span", "sequence")[0].text)
        (strip,) = bar.all("svg", "strip")
        assert "".join(text.text for text in strip.all("text")) == sequence.letters
        classes = {letter: group.attributes["class"] for letter, group in zip(sequence, strip.all("g"), strict=True)}
        assert classes == {letter: f"p{'AM'.index(letter)}" for letter in sequence.counts}
        lefts = [percent(rect, "x") for rect in strip.all("rect")]
        assert lefts == pytest.approx([100 * block / len(sequence) for block in range(len(sequence))], abs=1e-3)
        width = float(re.fullmatch(r"width:([\d.]+)%", strip.attributes["style"])[1])
        assert width == pytest.approx(100 * len(sequence) / 64, abs=1e-3)


# What is missing, early or broken


@pytest.mark.parametrize(
    ("change", "gone", "words"),
    [
        ({"study": None}, ANALYSES | {"search", "vote"}, "no study folder was given"),
        ({"plan": None}, {"plan"}, "no plan was given"),
        ({"runs": {}}, {"training", "samples"}, "no training run was given"),
        ({"text": None}, set(), "no text folder was given"),
        ({"architectures": {}, "runs": {}}, {"costs", "training", "samples"}, "no architecture was given"),
    ],
)
def test_what_is_absent_is_left_out_and_said(inputs, change, gone, words):
    whole = ANALYSES | {"search", "vote", "sequences", "costs", "plan", "training", "samples", "settings"}
    page = parse(build_report(replace(inputs, **change)))
    assert {node.attributes["id"] for node in page.all("section")} == whole - gone
    assert words in page.all("aside", "left-out")[0].text


def test_nothing_at_all():
    page = parse(build_report(ReportInputs()))
    assert [node.attributes["id"] for node in page.all("section")] == ["settings"]
    reasons = [item.text for item in page.all("aside")[0].all("li")]
    assert reasons[0] == (
        "Candidates and scores, Score against cost, Tasks and agreement, How sure is the ranking?, The vote, "
        "Cost of the search: no study folder was given"
    )
    assert len(reasons) == 6
    found = {row.nodes[0].text: row.nodes[1].text for row in page.all("dl")[0].nodes}
    assert found["python"] == platform.python_version() and found["packages.numpy"] == metadata.version("numpy")


def test_a_run_under_way(inputs, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(inputs.study, folder)
    (folder / "aggregate.json").unlink()
    write_lines(folder / "trials.jsonl", trial_lines(3)[:1])
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"trial": 1, "seq')  # the writer was killed here
    Architecture(CompositeSequence("AM"), PRESETS["tiny"]).save(tmp_path / "run/architecture.json")
    page = parse(build_report(ReportInputs(study=folder, runs={"young": tmp_path / "run"})))
    assert len(rows(page, "Trials of the study")) == 1
    assert "has not been aggregated" in page.all("aside")[0].text
    assert (
        "not evaluated" in section(page, "training").text
        and "No loss has been logged" in section(page, "training").text
    )
    (folder / "trials.jsonl").unlink()
    assert "no scored trial yet" in parse(build_report(ReportInputs(study=folder))).all("aside")[0].text


def test_a_resumed_run_counts_each_step_once_and_nan_is_told(inputs, tmp_path):
    shutil.copytree(inputs.runs["composite"], tmp_path / "run")
    loss = {"name": "lm loss", "time": 0.0}
    values = ((1, 8.0), (2, 7.5), (3, 7.0), (2, 7.25), (3, math.nan), (4, 6.0))
    write_lines(tmp_path / "run/metrics.jsonl", [loss | {"iteration": step, "value": value} for step, value in values])
    run = read_run("run", tmp_path / "run")
    assert run.training == ((1, 8.0), (2, 7.25), (3, 7.0), (4, 6.0)) and run.dropped == 1
    text = build_report(ReportInputs(runs={"run": tmp_path / "run"}))
    assert "1 logged losses were no finite number" in text


def test_one_seed_says_so(tmp_path):
    page = parse(build_report(write_all(tmp_path, seeds=1)))
    search = section(page, "search")
    assert "one seed per candidate" in search.text and "the noise of a score is not measured" in search.text
    assert not search.all("line", "whisker") and "standard deviation" not in search.text
    assert all(cells[3].text == "–" for cells in rows(page, "Trials of the study"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("study/study.json", None, "is no file"),
        ("study/study.json", "{", "line 1, column 2"),
        ("study/study.json", '{"format": "else"}', '"format": "composer-study"'),
        ("study/study.json", '{"format": "composer-study", "version": 9}', "version 9"),
        ("study/trials.jsonl", 'x\n{"trial": 1}\n', "line 1"),
        ("study/trials.jsonl", '{"trial": 0, "sequence": "2X", "status": "failed"}', "unknown primitive 'X'"),
        ("study/trials.jsonl", '{"trial": 0, "sequence": "2A", "status": "completed"}', "score=None"),
        ("study/trials.jsonl", '{"trial": 0, "sequence": "2A", "status": "completed", "score": NaN}', "finite number"),
        ("study/trials.jsonl", '{"trial": "0", "sequence": "2A", "status": "failed"}', "trial='0'"),
        ("study/aggregate.json", '{"sequence": "2A4M"}', "members=None"),
        (
            "study/aggregate.json",
            '{"sequence": "2A", "members": [], "member_scores": [], "votes": [{"Z": 1}, {}], "decisions": ["", ""]}',
            "'Z'",
        ),
        (
            "study/aggregate.json",
            '{"sequence": "2A", "members": ["2A"], "member_scores": [], "votes": []}',
            "decisions",
        ),
        ("composite/architecture.json", None, "is no file"),
        ("composite/metrics.jsonl", '{"iteration": "x", "name": "lm loss", "value": 1}\n', "iteration='x'"),
        ("composite/eval.json", '{"tokens": 1}', "bytes=None"),
        ("composite/samples.json", '[{"prompt": "a"}]', "holds no samples"),
        ("composite/samples.json", '{"prompt"', "holds no samples"),
        ("text/text.json", '{"format": "composer-text", "version": 1}', "train=None"),
        ("plan.json", '{"sequence": "2A", "stages": []}', "not those of 2A"),
        ("plan.json", '{"sequence": "2A", "stages": [{"blocks": "2A"}]}', "flops_per_token=None"),
        ("deep.json", "[]", "expected a JSON object"),
    ],
)
def test_a_broken_file_is_named_and_the_old_page_stays(tmp_path, name, content, words):
    inputs = write_all(tmp_path)
    (tmp_path / "report.html").write_text("the page of yesterday")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(FileError) as caught:
        write_report(inputs, tmp_path / "report.html")
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)
    assert (tmp_path / "report.html").read_text() == "the page of yesterday"


def test_seq_len_must_be_positive():
    with pytest.raises(UsageError, match="seq_len=0"):
        ReportInputs(seq_len=0)
