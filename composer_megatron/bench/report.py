"""What was measured: every result in ``benchmarks/results``.

A result is a JSON file that a benchmark wrote, with the GPU, the date and the versions. The README's figures are made
from them (`composer_megatron.bench.headline`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_megatron.bench.kernels import Verdict, verdicts
from composer_megatron.errors import FileError
from composer_megatron.files import read_json
from composer_megatron.sequence import CompositeSequence

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where figures come from.

    Attributes:
        file: Below the folder of the results.
        kind: training, kernel, inference, search or cache.
        gpu: Its name.
        date: Of the measurement, ISO 8601.
        versions: Of the packages that matter, by name.
    """

    file: str
    kind: str
    gpu: str
    date: str
    versions: dict[str, str]

    def says(self) -> str:
        """In one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return ", ".join(part for part in (self.gpu, versions, self.date) if part)


@dataclass
class Results:
    """All that was measured; every row says in ``source`` where it comes from.

    Attributes:
        training: Rows of ``bench_training.py``: a model on a backend at a sequence length.
        inference: Rows of ``bench_inference.py``: a model at a batch and a context.
        cache: Batches that ``kv --check`` allocated and decoded.
        search: Rows of ``bench_search.py``: seconds of a candidate-step, and the advantage over one at a time.
        studies: Its predictions of whole studies, from steps that it measured: ``study`` and ``hours``.
        kernels: Rows of ours of each kernel and case beside the best peer of the same work, with their source.
        ceilings: Of the GPUs, by name: copy bandwidth and GEMM rate.
        sources: Files that hold results.
        ignored: Files that hold none.
    """

    training: list[Row] = field(default_factory=list)
    inference: list[Row] = field(default_factory=list)
    cache: list[Row] = field(default_factory=list)
    search: list[Row] = field(default_factory=list)
    studies: list[Row] = field(default_factory=list)
    kernels: list[tuple[Verdict, Source]] = field(default_factory=list)
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    @property
    def gpus(self) -> list[str]:
        """Names, in order."""
        return sorted({source.gpu for source in self.sources})

    @property
    def unfair(self) -> list[str]:
        """Training rows that are shown and compared to none, each with its reason."""
        return [
            f"{row['shape']} {row['model']}, {row['backend']}, {row['seq_len']:,} tokens ({row['source'].file}): "
            f"{row['unfair']}"
            for row in self.training
            if row.get("unfair")
        ]


def read_results(folder: Path) -> Results:
    """Read every JSON file below a folder.

    Raises:
        FileError: If there is no such folder, or a file is no JSON.
    """
    if not folder.is_dir():
        raise FileError(f"{folder} is no folder: expected results of benchmarks; composer-megatron bench … makes them")
    results = Results()
    for path in sorted(folder.rglob("*.json")):
        _add(results, path.relative_to(folder).as_posix(), read_json(path, "a benchmark's result"))
    return results


def _add(results: Results, file: str, result: dict[str, Any]) -> None:
    rows: list[Row]
    if isinstance(result.get("models"), dict):
        rows, kind = _rows_of_pair(result), "training"
    elif isinstance(result.get("speeds"), list):
        rows, kind = _rows_of_search(result["speeds"]), "search"
    elif isinstance(result.get("trials"), list):
        rows, kind = result["trials"], "cache"
    elif (found := _kind(result)) is not None:
        rows, kind = result["rows"], found
    else:
        results.ignored.append(file)
        return
    if kind == "kernel" and "ceilings_reached_by" not in result:
        result = _without_ceilings(result)
    source = _source(file, kind, result)
    results.sources.append(source)
    if isinstance(result.get("ceilings"), dict):
        known = {name: value for name, value in result["ceilings"].items() if value}
        results.ceilings.setdefault(source.gpu, {}).update(known)
    if kind == "kernel":
        results.kernels += [(verdict, source) for verdict in verdicts(result)]
    else:
        getattr(results, kind).extend(row | {"source": source} for row in rows)
    for study in (result.get(name) for name in ("oracle", "study") if kind == "search"):
        if study:
            hours = sum(task["hours"] for task in study["tasks"])
            results.studies.append({"study": study["study"], "hours": hours, "source": source})


def _kind(result: dict[str, Any]) -> str | None:
    """What the rows of a result are of; None where it has none that are known."""
    rows = result.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    if "op" in result:
        return "kernel"
    fields = {"training": {"backend", "model", "seq_len"}, "inference": {"batch", "context", "model"}}
    return next((kind for kind, needed in fields.items() if rows and all(needed <= row.keys() for row in rows)), None)


def _without_ceilings(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what it says of ceilings: its version timed a captured `copy_`, slower than a kernel."""
    rows = [row | {"fraction": None} for row in result["rows"]]
    return {key: value for key, value in result.items() if key != "ceilings"} | {"rows": rows}


def _source(file: str, kind: str, result: dict[str, Any]) -> Source:
    environment = result.get("environment") or {}
    packages = environment.get("packages") or {}
    gpus = environment.get("gpus") or [{}]
    wanted = {"training": ("torch", "megatron-core", "triton"), "inference": ("torch", "triton")}
    versions = {name: packages[name] for name in wanted.get(kind, ("torch", "triton")) if packages.get(name)}
    gpu = result.get("gpu") or gpus[0].get("name") or "CPU"
    return Source(file, kind, str(gpu), str(result.get("date", "")), versions)


def _rows_of_pair(result: dict[str, Any]) -> list[Row]:
    """A result of one Composite beside its baseline, as an earlier version wrote it."""
    rows = []
    for name, model in result["models"].items():
        row = {key: value for key, value in model.items() if key != "sequence"}
        row |= {
            "model": "llama" if name == "baseline" else "stacked",
            "sequence": CompositeSequence.parse(model["sequence"]).notation,
            "shape": result["shape"]["name"],
            "backend": "PyTorch modules",
            "seq_len": result["seq_len"],
            "micro_batch": result["batch"],
            "micro_batches": 1,
            "note": "",
        }
        rows.append(row)
    return rows


def _rows_of_search(speeds: Sequence[Row]) -> list[Row]:
    """Candidate-steps beside those of candidates that train one at a time."""
    timed = [row | {"seconds": row["step"] / row["rows"]} for row in speeds if row["step"]]
    alone = {row["case"]: row["seconds"] for row in timed if row["contender"].startswith("one at a time, eager")}
    return [row | {"advantage": alone[row["case"]] / row["seconds"] if row["case"] in alone else None} for row in timed]


def comparable(row: Row) -> bool:
    """Whether a training row was timed, and nothing in it (``unfair``) speaks against comparing it to others."""
    return bool(row.get("tokens_per_second")) and not row.get("unfair")


def rate(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The fastest training row with these values; None where there is none that was timed and may be compared."""
    fit = [row for row in rows if comparable(row) and all(row.get(k) == v for k, v in wanted.items())]
    return max(fit, key=lambda row: float(row["tokens_per_second"]), default=None)


def ratios(rows: Sequence[Row], gpu: str, shape: str, backend: str, model: str) -> list[tuple[int, float]]:
    """Tokens/s of a model over Llama's by sequence length, each pair from the file in which the model is fastest."""
    found: dict[int, tuple[float, float]] = {}
    for row in rows:
        same = (row["source"].gpu, row["shape"], row["backend"], row["model"]) == (gpu, shape, backend, model)
        # A Composite of other widths names its shape after the one that it was matched to.
        llama = rate(rows, source=row["source"], shape=shape, backend=backend, model="llama", seq_len=row["seq_len"])
        if same and llama and comparable(row):
            speed = row["tokens_per_second"]
            pair = (speed, speed / llama["tokens_per_second"])
            found[row["seq_len"]] = max(pair, found.get(row["seq_len"], pair))
    return sorted((length, ratio) for length, (_, ratio) in found.items())
