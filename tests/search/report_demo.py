"""A demo's files for the report's tests, made from nothing, and a page as a tree of elements."""

import itertools
import json
import math
import random
import shutil
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

from composer_megatron.architecture import Architecture
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_search.report import ReportInputs

TASKS = ("in-context-recall", "memorization", "selective-copying")
UNIGRAM = {"unigram_nats_per_token": 6.27141, "unigram_bits_per_byte": 2.58834}
VALID = {"documents": 32, "tokens": 164_210, "bytes": 574_012}
PROMPTS = ("def main(", "import os")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$title ${body}",
    "</pre></svg>&amp;",
    "w" * 300,
)


def trial_lines(seeds: int, count: int = 24) -> list[dict]:
    rng = random.Random(5)
    lines = []
    for number in range(count):
        sequence = str(CompositeSequence("".join(rng.choice("AM") for _ in range(6))))
        line = {"trial": number, "sequence": sequence, "proposer": "sobol" if number < 8 else "bayesian"}
        scores = [rng.uniform(0.3, 0.7) for _ in range(seeds)]
        mean = sum(scores) / seeds
        spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / seeds)
        line |= {"status": "completed", "score": mean, "spread": spread, "seed_scores": scores, "seconds": 9.25}
        line |= {"tasks": {task: rng.random() for task in TASKS}, "test_score": mean - 0.01}
        lines.append(line)
    failed = {
        "trial": 11,
        "sequence": "6M",
        "status": "failed",
        "error": "loss is <NaN> at step 12",
        "proposer": "sobol",
    }
    lines[11] = failed
    return lines


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_study(folder: Path, seeds: int) -> None:
    settings = {"space": {"primitives": "AM", "length": 6}, "proposer": {"name": "bayesian", "initial": 8, "seed": 7}}
    settings |= {"evaluator": {"name": "mad", "tasks": list(TASKS), "learning_rate": 0.0015}, "budget": 24}
    write(
        folder / "study.json", {"format": "composer-study", "version": 1, "created": "2026-10-05T09:12:44"} | settings
    )
    lines = trial_lines(seeds)
    write_lines(folder / "trials.jsonl", lines)
    best = sorted((line for line in lines if "score" in line), key=lambda line: -line["score"])[:5]
    letters = [CompositeSequence.parse(line["sequence"]).letters for line in best]
    votes = [{symbol: column.count(symbol) for symbol in "AM"} for column in zip(*letters, strict=True)]
    aggregate = {"sequence": "2A4M", "runs": [["A", 2], ["M", 4]], "context": 0, "clusters": 5, "cluster_size": 5}
    aggregate |= {"members": [line["sequence"] for line in best], "member_scores": [line["score"] for line in best]}
    write(
        folder / "aggregate.json", aggregate | {"votes": votes, "decisions": ["vote"] * 4 + ["tie", "unseen context"]}
    )


def write_run(folder: Path, architecture: Architecture, final: float) -> None:
    folder.mkdir(parents=True)
    architecture.save(folder / "architecture.json")
    rng, lines = random.Random(final), []
    for step in range(10, 401, 10):
        loss = final + 5 * math.exp(-step / 60)
        lines.append({"iteration": step, "name": "lm loss", "value": loss + rng.gauss(0, 0.05), "time": 0.0})
        lines.append({"iteration": step, "name": "learning-rate", "value": 1e-3, "time": 0.0})
        if step % 100 == 0:
            lines.append({"iteration": step, "name": "lm loss validation", "value": loss, "time": 0.0})
    write_lines(folder / "metrics.jsonl", lines)
    bits = final / math.log(2) * VALID["tokens"] / VALID["bytes"]
    evaluation = {"nats_per_token": final, "bits_per_byte": bits, "perplexity": math.exp(final), "iteration": 400}
    write(folder / "eval.json", evaluation | {"tokens": VALID["tokens"], "bytes": VALID["bytes"]})
    write(folder / "samples.json", [{"prompt": each, "text": f"{each} = {final}\n\tx < y & z"} for each in PROMPTS])


def write_all(root: Path, *, seeds: int = 3) -> ReportInputs:
    """A whole demo run; the paths of the report's inputs."""
    composite = Architecture(CompositeSequence.parse("2A4M1A2M"), PRESETS["demo"], {"method": "stack"})
    write_study(root / "study", seeds)
    write_run(root / "composite", composite, 3.41)
    write_run(root / "baseline", composite.baseline(), 3.47)
    text = {"format": "composer-text", "version": 1, "sources": ["a.py"], "vocab_size": 4096, "end_of_text": 0}
    write(
        root / "text/text.json", text | {"train": {"documents": 612, "tokens": 1, "bytes": 4}, "valid": VALID | UNIGRAM}
    )
    stage = {"flops_per_token": 9_660_672, "params_per_rank": 2_298_816, "state_bytes": 41_378_688}
    stages = [{"blocks": blocks} | stage | {"activation_bytes": 40_239_104} for blocks in ("2A3M", "1M1A2M")]
    write(root / "plan.json", {"sequence": "2A4M1A2M", "stages": stages, "balance": 0.944, "balance_equal_split": 0.75})
    Architecture(CompositeSequence.parse("18A37M"), PRESETS["8b"]).save(root / "deep.json")
    return ReportInputs(
        study=root / "study",
        architectures={"deep": root / "deep.json"},
        runs={"composite": root / "composite", "baseline": root / "baseline"},
        text=root / "text",
        plan=root / "plan.json",
        seq_len=256,
        environment={"python": "3.12.1", "packages": {"torch": "2.11.0", "apex": None}, "gpus": []},
    )


def hostile(inputs: ReportInputs, root: Path) -> ReportInputs:
    """The demo run with `HOSTILE` wherever a person or a model chooses the text."""
    shutil.copytree(inputs.study, root / "study")
    lines = trial_lines(2)
    lines[3] |= {"status": "failed", "error": HOSTILE[0]}
    for line in lines:
        line["proposer"] = HOSTILE[1]
        line["tasks"] = {HOSTILE[0]: 0.5, HOSTILE[2]: 0.25}
    write_lines(root / "study/trials.jsonl", lines)
    settings = json.loads((inputs.study / "study.json").read_text())
    write(root / "study/study.json", settings | {HOSTILE[0]: HOSTILE[1], HOSTILE[4]: HOSTILE[4], "created": HOSTILE})
    shutil.copytree(inputs.runs["composite"], root / "run")
    samples = [{"prompt": each, "text": f"{each}\0\ud800\x1b \u202e{each}"} for each in HOSTILE]
    write(root / "run/samples.json", samples)
    architectures = dict.fromkeys(HOSTILE, inputs.architectures["deep"])
    runs = dict(zip(HOSTILE, itertools.cycle(inputs.runs.values()))) | {"run": root / "run"}
    return replace(inputs, study=root / "study", architectures=architectures, runs=runs)


@dataclass
class Node:
    """An element of a parsed page."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list["Node | str"] = field(default_factory=list)

    def all(self, tag: str, class_: str | None = None) -> list["Node"]:
        below = itertools.chain.from_iterable(child.all(tag, class_) for child in self.nodes)
        classes = (self.attributes.get("class") or "").split()
        return [*([self] if self.tag == tag and class_ in (None, *classes) else []), *below]

    @property
    def nodes(self) -> list["Node"]:
        return [child for child in self.children if isinstance(child, Node)]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def values(self) -> list[float]:
        return [float(data.attributes["value"] or "") for data in self.all("data")]

    def by_id(self, name: str) -> "Node":
        (found,) = (node for node in self.every() if node.attributes.get("id") == name)
        return found

    def every(self) -> "itertools.chain[Node]":
        return itertools.chain([self], *(child.every() for child in self.nodes))


class TreeBuilder(HTMLParser):
    """Parses a page and fails where a tag is not closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("page")]

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in <{tag}>"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag != "meta":
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    builder = TreeBuilder()
    builder.feed(page)
    builder.close()
    (root,) = builder.open
    return root


def rows(page: Node, caption: str) -> list[list[Node]]:
    """The body rows of the table with that caption, as cells."""
    (found,) = (table for table in page.all("table") if table.all("caption")[0].text == caption)
    return [row.nodes for row in found.all("tbody")[0].all("tr")]


def numbers(cells: list[Node]) -> list[float]:
    return list(itertools.chain.from_iterable(cell.values for cell in cells))


def section(page: Node, name: str) -> Node:
    return page.by_id(name)
