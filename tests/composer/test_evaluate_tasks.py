"""lm-eval on a run: what it is told equals log-probabilities computed one text at a time, in float64."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.checkpoint import load_run
from composer_megatron.cli import main
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.evaluate_tasks import _load, _manager, evaluate_tasks, local_files, local_task

pytest.importorskip("lm_eval", reason="needs the extra [eval]")
torch.set_num_threads(1)

LENGTH = 32
"""The longest sequence of the runs of the tests."""


@pytest.fixture(scope="module")
def run(runs):
    with load_run(runs["plain"]) as run:
        yield run


@pytest.fixture(scope="module")
def harness():
    from composer_megatron import harness

    return harness


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def log_probabilities(run, inputs: list[int]) -> torch.Tensor:
    """Of every token after each of the inputs, one sequence alone, in float64."""
    with torch.no_grad():
        logits = run.model(torch.tensor([inputs]), torch.arange(len(inputs))[None], None)
    return logits[0].double().log_softmax(-1)


def reference(run, context: str, continuation: str) -> tuple[float, bool]:
    """By lm-eval's convention: spaces at the context's end belong to the continuation; the beginning is cut off."""
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    encode = run.require_tokenizer().encode
    before = encode(context).ids if context else [0]  # 0 is the end of text
    whole = encode(context + continuation).ids if context else before + encode(continuation).ids
    after = whole[len(before) :]
    whole = whole[-(LENGTH + 1) :]
    table = log_probabilities(run, whole[:-1])[-len(after) :]
    targets = torch.tensor(whole[1:])[-len(after) :]
    total = table[-len(targets) :].gather(1, targets[:, None]).sum()
    return float(total), bool((table.argmax(-1)[-len(targets) :] == targets).all())


PAIRS = [
    ("1 Äpfel, 2", " Äpfel"),
    ("1 Äpfel, 2 ", "Äpfel, 3 Äpfel"),
    ("", "7 Äpfel!"),
    ("3 Äpfel, " * 20, "4 Äpfel"),  # longer than a sequence
    ("0", "!"),
    ("0", " x"),
]


@pytest.mark.parametrize("batch_tokens", [1, 64, None])
def test_continuations(run, harness, batch_tokens) -> None:
    model = harness.RunLM(run, batch_tokens=batch_tokens)
    found = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (total, greedy), pair in zip(found, PAIRS, strict=True):
        wanted = reference(run, *pair)
        assert total == pytest.approx(wanted[0], rel=1e-5)  # fp32 logits of the model in a padded batch
        assert greedy == wanted[1]


def test_the_likeliest_continuation_is_greedy(run, harness) -> None:
    tokenizer = run.require_tokenizer()
    context = "1 Äpfel, 2"
    ids = tokenizer.encode(context).ids
    best = int(log_probabilities(run, ids)[-1].argmax())
    stretches = [harness.Stretch(tuple(ids), (best,)), harness.Stretch(tuple(ids), ((best + 1) % 290,))]
    first, second = harness.score_all(run, stretches, 1000)
    assert first.is_greedy
    assert not second.is_greedy
    assert first.log_probability > second.log_probability


def test_equal_inputs_run_once(run, harness, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    logits = harness._logits
    monkeypatch.setattr(harness, "_logits", lambda run, batch: seen.extend(batch) or logits(run, batch))
    stretches = [harness.Stretch((1, 2, 3), (number,)) for number in range(5)]
    scores = harness.score_all(run, stretches, 1000)
    assert seen == [(1, 2, 3)]
    assert len({score.log_probability for score in scores}) == 5
    assert harness.score_all(run, [harness.Stretch((1,), ())], 10) == [(0.0, True)]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_scores_do_not_depend_on_the_batch(run, harness, data) -> None:
    tokens = st.lists(st.integers(0, 289), min_size=1, max_size=LENGTH)
    inputs = data.draw(st.lists(tokens, min_size=1, max_size=6))
    stretches = []
    for each in inputs:
        targets = data.draw(st.lists(st.integers(0, 289), min_size=1, max_size=len(each)))
        stretches.append(harness.Stretch(tuple(each), tuple(targets)))
    together = harness.score_all(run, stretches, data.draw(st.integers(1, 200)))
    for stretch, score in zip(stretches, together, strict=True):
        table = log_probabilities(run, list(stretch.inputs))[-len(stretch.targets) :]
        wanted = float(table.gather(1, torch.tensor(stretch.targets)[:, None]).sum())
        assert score.log_probability == pytest.approx(wanted, rel=1e-5)


def test_whole_texts_are_cut_into_windows_that_count_each_token_once(run, harness) -> None:
    texts = ["1 Äpfel!", "5 Äpfel, " * 30, ""]
    found = harness.RunLM(run).loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, total in zip(texts, found, strict=True):
        ids = [0, *run.require_tokenizer().encode(text).ids]
        wanted = 0.0
        for start in range(1, len(ids), LENGTH):  # a window predicts a sequence's length, or what is left
            end = min(start + LENGTH, len(ids))
            inputs = ids[max(0, end - 1 - LENGTH) : end - 1]  # the last one knows as much as fits
            table = log_probabilities(run, inputs)[start - end :]
            wanted += float(table.gather(1, torch.tensor(ids[start:end])[:, None]).sum())
        assert total == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_writing_stops_where_told(run, harness) -> None:
    model = harness.RunLM(run)
    free, ended = model.generate_until(
        requests(("1 Äpfel, ", {"max_gen_toks": 12}), ("1 Äpfel, ", {"until": "zzz", "max_gen_toks": 12}))
    )
    assert free == ended
    assert free
    stop = free[len(free) // 2]
    (short,) = model.generate_until(requests(("1 Äpfel, ", {"until": ["", stop], "max_gen_toks": 12})))
    assert short == free.partition(stop)[0]
    (cut,) = model.generate_until(requests(("9 Äpfel, " * 40, {"max_gen_toks": 8, "do_sample": False})))
    assert isinstance(cut, str)  # the prompt was longer than a sequence: its end counts
    with pytest.raises(UsageError, match="num_beams"):
        model.generate_until(requests(("1", {"num_beams": 4})))


ARC = [
    {"question": f"{n} Äpfel", "choices": {"text": ["2 Äpfel", "!", "9"], "label": ["A", "B", "C"]}, "answerKey": key}
    for n, key in enumerate("ABCA", start=1)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "arc_easy_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ARC), encoding="utf-8")
    lines = [{"text": "1 Äpfel, 2 Äpfel, 3 Äpfel"}, {"text": "4 Äpfel, 8 Äpfel!"}]
    (folder / "lambada_openai_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_tasks_with_local_documents(run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = evaluate_tasks(run, ["arc_easy", "lambada_openai"], data=data)
    scores = {(score.task, score.metric): score for score in found.scores}
    right = []
    for document in ARC:
        prompt = f"Question: {document['question']}\nAnswer:"
        totals = [reference(run, prompt, f" {choice}")[0] for choice in document["choices"]["text"]]
        right.append(totals.index(max(totals)) == "ABC".index(document["answerKey"]))
    assert scores["arc_easy", "acc"].value == pytest.approx(sum(right) / 4)
    assert scores["arc_easy", "acc"].samples == 4
    texts = [("1 Äpfel, 2 Äpfel, 3", " Äpfel"), ("4 Äpfel, 8", " Äpfel!")]
    mean = sum(reference(run, *pair)[0] for pair in texts) / 2
    assert scores["lambada_openai", "perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-5)
    path = found.save(tmp_path)
    saved = path.read_text()
    assert path.name == "tasks.json"
    assert str(data) not in saved  # names of files, no places of this machine
    assert json.loads(saved)["data"]["arc_easy"]["file"] == "arc_easy_test.jsonl"
    assert evaluate_tasks(run, ["arc_easy"], data=data, limit=2).scores[0].samples == 2


@pytest.mark.parametrize("fewshot", [None, 2])
def test_prompts_and_scores_are_those_of_lm_evals_way_in(run, harness, data, tmp_path, monkeypatch, fewshot) -> None:
    """`simple_evaluate` calls git and lists all packages; what it does besides is done here, with the same seeds."""
    from lm_eval import simple_evaluate

    seen = []
    original = harness.RunLM.loglikelihood

    def record(model, asked, **_):
        seen.append([request.args for request in asked])
        return original(model, asked)

    monkeypatch.setattr(harness.RunLM, "loglikelihood", record)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = evaluate_tasks(run, ["arc_easy"], data=data, fewshot=fewshot)
    manager = _manager(None)
    tasks = list(_load(manager, ["arc_easy"], {"arc_easy": data / "arc_easy_test.jsonl"}).values())
    wanted = simple_evaluate(harness.RunLM(run), tasks=tasks, num_fewshot=fewshot, task_manager=manager)
    ours, theirs = seen
    assert ours == theirs
    assert ours[0][0].count("Question") == 1 + (fewshot or 0)
    for score in found.scores:
        assert score.value == wanted["results"]["arc_easy"][f"{score.metric},{score.filter}"]
        assert score.fewshot == wanted["n-shot"]["arc_easy"] == (fewshot or 0)


def test_nothing_of_lm_evals_reaches_the_user(runs, data: Path, tmp_path: Path) -> None:
    """Outside a checkout and where no terminal shows it: git does not complain, no bar, and output is results alone."""
    folder = shutil.copytree(runs["plain"], tmp_path / "run")
    command = [sys.executable, "-m", "composer_megatron", "eval", folder, "--json"]
    command += ["--tasks", "arc_easy", "lambada_openai", "--task-data", data]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {score["task"] for score in json.loads(done.stdout)["tasks"]} == {"arc_easy", "lambada_openai"}
    assert done.stderr == "bootstrapping for stddev: perplexity\n"


def test_the_command_says_what_it_waits_for_and_where_results_are(runs, data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(runs["plain"], tmp_path / "run")
    text = tmp_path / "text.txt"
    text.write_text("1 Äpfel, 2 Äpfel", encoding="utf-8")
    main(["eval", str(folder), "--text", str(text), "--tasks", "arc_easy", "--task-data", str(data)])
    out, err = capsys.readouterr()
    assert f"written to {folder / 'eval.json'} and {folder / 'tasks.json'}" in out
    assert "hub" not in err

    def refuse(*_: object) -> None:
        assert "asking the hub for tasks piqa, sciq\n" in capsys.readouterr().err  # before it begins
        raise ComposerError("no network")

    monkeypatch.setattr("composer_megatron.evaluate_tasks._load", refuse)
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--tasks", "piqa", "arc_easy", "sciq", "--task-data", str(data)])
    assert "no network" in capsys.readouterr().err


def test_files_belong_to_the_longest_task_that_they_name(tmp_path: Path) -> None:
    for name in ("arc_easy_test", "arc_challenge_validation", "piqa", "winogrande_xl_validation", "other"):
        (tmp_path / f"{name}.jsonl").write_text("")
    found = local_files(tmp_path, ["arc_easy", "arc_challenge", "piqa", "winogrande", "sciq"])
    assert {task: path.stem for task, path in found.items()} == {
        "arc_easy": "arc_easy_test",
        "arc_challenge": "arc_challenge_validation",
        "piqa": "piqa",
        "winogrande": "winogrande_xl_validation",
    }
    assert local_task("winogrande", found["winogrande"])["validation_split"] == "validation"
    assert local_task("piqa", found["piqa"])["test_split"] == "test"


def test_refusals(run, runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="did you mean arc_easy"):
        evaluate_tasks(run, ["arc_eazy"])
    with pytest.raises(UsageError, match="limit=0"):
        evaluate_tasks(run, ["arc_easy"], limit=0)
    with pytest.raises(UsageError, match="no task"):
        evaluate_tasks(run, [])
    with pytest.raises(FileError, match="is no folder"):
        evaluate_tasks(run, ["arc_easy"], data=tmp_path / "none")
    (tmp_path / "piqa.jsonl").write_text("{not json}\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ComposerError, match="cannot load piqa"):
        evaluate_tasks(run, ["piqa"], data=tmp_path)
    with pytest.raises(UsageError, match="batch_tokens=0"):
        evaluate_tasks(run, ["piqa"], batch_tokens=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ComposerError, match=r"composer-megatron\[eval\]"):
        evaluate_tasks(run, ["arc_easy"])
