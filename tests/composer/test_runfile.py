"""A run's file: what it says, that repeating from it gives the same numbers to the last bit, and what is refused."""

import dataclasses
import json
import shutil

import pytest

from composer_megatron import runfile
from composer_megatron.arguments import parse_options
from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import read_json, read_json_lines

from .conftest import Place

START = runfile.Start(
    ("--text", "/t", "--lr", "1"), 2, ("--lr=1",), ({"path": "/t", "train_sha256": "a"},), {"python": "3"}
)


def numbers(folder):
    """What a run logged, but for the time it took."""
    lines = read_json_lines(folder / "metrics.jsonl")
    kept = [line for line in lines if not any(word in line["name"] for word in ("time", "throughput"))]
    return [(line["name"], line["iteration"], line["value"]) for line in kept]


@pytest.fixture(scope="module")
def own_place(place, tmp_path_factory):
    """A place whose files may be changed."""
    path = tmp_path_factory.mktemp("own")
    shutil.copytree(place.path / "text", path / "text")
    shutil.copy(place.path / "architecture.json", path)
    return Place(path, place.server)


class Repeating(Place):
    """The same, started with nothing but a run's file."""

    def arguments(self, name, *flags):
        return ["--run-dir", str(self.path / name), *flags]


def test_a_repetition_is_the_same_to_the_last_bit(own_place):
    first = own_place.run("first", "--document-masks", "--train-iters", "4")
    assert first.status == 0, first.output
    (start,) = runfile.load_starts(first.folder / "run.json")
    assert start.processes == 1 and start.text[0]["train_tokens"] > 0 and "--seed" not in start.arguments
    assert "torch" in start.environment["packages"] and any(
        flag.startswith("--padded-vocab") for flag in start.megatron
    )
    # The architecture comes from the run folder, so that the first file may be gone.
    (own_place.path / "architecture.json").rename(own_place.path / "moved.json")
    again = Repeating(own_place.path, own_place.server).run("again", "--repeat", str(first.folder))
    (own_place.path / "moved.json").rename(own_place.path / "architecture.json")
    assert again.status == 0, again.output
    assert numbers(again.folder) == numbers(first.folder) and len(numbers(first.folder)) > 10
    (repeated,) = runfile.load_starts(again.folder / "run.json")
    assert dataclasses.replace(repeated, megatron=start.megatron) == start  # whose folders differ
    assert "note: unlike" not in again.output


def test_differences_and_other_text(own_place, tmp_path):
    runfile.record(tmp_path, dataclasses.replace(START, environment=runfile.current_environment()))
    path = tmp_path / "run.json"
    assert runfile.differences(path, 2) == []
    values = read_json(path, "a run file")
    values["starts"][0]["environment"]["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(values))
    processes, torch = runfile.differences(path, 1)
    assert processes == "2 processes then, 1 now" and torch.startswith("packages torch: 1.0 then, ")
    runfile.check_text(path, [{"path": "/elsewhere", "train_sha256": "a"}])
    with pytest.raises(FileError, match=r"/t is not the text that the run of .* was trained on: train_sha256 changed"):
        runfile.check_text(path, [{"path": "/t", "train_sha256": "b"}])
    with pytest.raises(FileError, match="trained on 1 texts, and 0 are given"):
        runfile.check_text(path, [])


def test_the_same_start_is_recorded_once(tmp_path):
    for _ in range(3):
        runfile.record(tmp_path, START)
    runfile.record(tmp_path, dataclasses.replace(START, processes=4))
    assert not any("continued" in line for line in runfile.differences(tmp_path / "run.json", 2))
    runfile.record(tmp_path, dataclasses.replace(START, arguments=("--lr", "2")))
    assert runfile.differences(tmp_path / "run.json", 2)[-1].startswith("the run was continued 1 times with other")
    values = read_json(tmp_path / "run.json", "a run file")
    (tmp_path / "run.json").write_text(json.dumps(values | {"starts": values["starts"][:2]}))
    assert runfile.load_starts(tmp_path / "run.json") == [START, dataclasses.replace(START, processes=4)]


def test_arguments_stand_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--architecture=a.json", "--text", "x", "--text=y", "--run-dir", "r", "--debug", "--lr", "1", "--fp32"]
    kept = runfile.portable_arguments([*argv, "--text-tokenizer", "t.json"])
    assert kept == ("--text", f"{tmp_path}/x", "--text", f"{tmp_path}/y", "--lr", "1", "--fp32")


def test_bad_requests(tmp_path):
    runfile.record(tmp_path / "run", START)
    (tmp_path / "run" / "architecture.json").write_text("{}")
    path = tmp_path / "run" / "run.json"
    options = parse_options([f"--repeat={path}", "--run-dir", str(tmp_path / "new")])
    assert options.repeat == path and options.megatron == ("--lr", "1")
    for argv, message in {
        ("--repeat",): "expected a file: the run.json of a run folder",
        ("--repeat", str(path)): "give --run-dir, too",
        ("--repeat", str(path), f"--run-dir={tmp_path}/run"): "that run's own folder",
    }.items():
        with pytest.raises(UsageError, match=message):
            parse_options(argv)
    new = ("--run-dir", str(tmp_path / "new"))
    (tmp_path / "run" / "architecture.json").unlink()
    with pytest.raises(FileError, match=r"architecture.json is missing, which a run folder has"):
        parse_options(["--repeat", str(path), *new])
    for text, message in {
        "{}": "is no run file of this program",
        '{"format": "composer-run", "version": 1, "starts": []}': "has no start to repeat",
        '{"format": "composer-run", "version": 1, "starts": [{}]}': "a value is missing",
        "torn": "is not a run file",
    }.items():
        path.write_text(text)
        with pytest.raises(FileError, match=message):
            parse_options(["--repeat", str(path), *new])
    with pytest.raises(FileError, match="expected a run file"):
        parse_options(["--repeat", str(tmp_path / "absent"), *new])
