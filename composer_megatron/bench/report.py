"""What was measured: every result in ``benchmarks/results``, and the README's headline figures made from them.

A result is a JSON file that a benchmark wrote, with the GPU, the date and the versions. Nobody types a figure: the
lines between two marks in the README are `headline` of the files, and a test holds them equal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_megatron.bench.kernels import Tally, Verdict, verdicts
from composer_megatron.errors import FileError
from composer_megatron.files import naming, read_json, write_text
from composer_megatron.sequence import CompositeSequence

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
"""The marks in the README."""

OURS, PEER = "composer", "compile"
"""The backend of the headline, and what it is measured against."""

VARIANTS = {
    "composer+activation=quack": "with SwiGLU within the products (`activation=quack`)",
    "composer+linear=fp8": "with products in 8 bits (`linear=fp8`)",
    "composer+linear=fp8-wgrad": "with weight gradients in 8 bits, too (`linear=fp8-wgrad`)",
}
"""The headline's backend with parts of others, and what that is."""

MEGATRON = {"te": "Megatron with TransformerEngine", "local": "Megatron with PyTorch alone"}
"""Megatron's own backends, and what they are."""

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


def headline(results: Results) -> str:
    """The README's figures in Markdown: one list for each GPU, and what they were measured with."""
    parts = [text for gpu in results.gpus if (text := _of_gpu(results, gpu))]
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


def _of_gpu(results: Results, gpu: str) -> str:
    makers = (_training_lines, _inference_lines, _kernel_lines, _search_lines)
    lines = [line for make in makers for line in make(results, gpu)]
    if not lines:
        return ""
    sources = [source for source in results.sources if source.gpu == gpu]
    versions = dict.fromkeys(pair for source in sources for pair in source.versions.items())
    dates = sorted({source.date for source in sources if source.date})
    said = ", ".join(f"{name} {version}" for name, version in versions)
    when = f"; {dates[0]}" if len(dates) == 1 else f"; {dates[0]} to {dates[-1]}" if dates else ""
    return "\n".join([f"**{gpu}** ({said}{when}):", "", *(f"- {line}" for line in lines)])


def _training_lines(results: Results, gpu: str) -> list[str]:
    rows = [row for row in results.training if row["source"].gpu == gpu]
    backends = {row["backend"] for row in rows if comparable(row)}
    ours = OURS if OURS in backends else min(backends, default=None)
    lines = []
    for shape in sorted({row["shape"] for row in rows if row["model"] == "llama"}):
        of_shape = [row for row in rows if row["shape"] == shape]
        cells = {length: [row for row in of_shape if row["seq_len"] == length] for length in _lengths(of_shape)}
        pairs = {length: pair for length, cell in cells.items() if (pair := _pair(cell, ours)) is not None}
        if not pairs:
            continue
        first = next((length for length, pair in pairs.items() if _beside_peer(cells[length], pair[0])), min(pairs))
        stacked, llama = pairs.pop(first)
        rates = " and ".join(f"{row['tflops']:.0f}{_mfu(row)}" for row in (stacked, llama))
        lines.append(
            f"training {shape} at {first:,} tokens: {_thousands(stacked)} with the Composite, {_thousands(llama)} with "
            f"Llama ({_gain(stacked, llama)}), {rates} TFLOP/s{_beside_peer(cells[first], stacked)}, backend {ours}"
        )
        if ours == OURS:
            lines += [said for name in VARIANTS if (said := _variant(cells[first], name, _step_tokens(stacked)))]
            lines += [said for name in MEGATRON if (said := _beside_megatron(cells[first], name))]
        if pairs:
            others = (f"{_thousands(a)} at {length:,} ({_gain(a, b)})" for length, (a, b) in pairs.items())
            lines.append(f"training {shape} by length, the Composite and its gain over Llama: {', '.join(others)}")
    return lines


def _lengths(rows: Sequence[Row]) -> list[int]:
    return sorted({row["seq_len"] for row in rows})


def _gain(row: Row, other: Row) -> str:
    return f"x{row['tokens_per_second'] / other['tokens_per_second']:.3f}"


def _pair(rows: Sequence[Row], backend: str | None) -> tuple[Row, Row] | None:
    """The fastest Composite on a backend and the Llama of the same file; None where no file has both."""
    found = []
    for source in {id(row["source"]): row["source"] for row in rows}.values():
        stacked, llama = (rate(rows, backend=backend, model=name, source=source) for name in ("stacked", "llama"))
        if stacked is not None and llama is not None:
            found.append((stacked, llama))
    return max(found, key=lambda pair: float(pair[0]["tokens_per_second"]), default=None)


def _variant(rows: Sequence[Row], backend: str, usual: int) -> str | None:
    """What a pair on another backend reaches, and how much that is over ours in the same file, if that has ours."""
    pair = _pair(rows, backend)
    if pair is None:
        return None
    said = []
    for row in pair:
        plain = rate(rows, backend=OURS, model=row["model"], source=row["source"])
        gain = "" if plain is None else f" ({_gain(row, plain)})"
        said.append(f"{_thousands(row)}{gain}")
    tokens = _step_tokens(pair[0])
    steps = "" if tokens == usual else f" in steps of {tokens:,} tokens"
    return f"the same {VARIANTS[backend]}{steps}: {' and '.join(said)}{_beside_peer(rows, pair[0])}"


def _step_tokens(row: Row) -> int:
    return int(row["micro_batches"] * row["micro_batch"] * row["seq_len"])


def _beside_megatron(rows: Sequence[Row], backend: str) -> str | None:
    """Llama on a backend of Megatron's, and ours beside it in the same file; None where no file has both."""
    llamas = [row for row in rows if row["backend"] == backend and row["model"] == "llama" and comparable(row)]
    for llama in llamas:
        ours = {row["model"]: row for row in rows if row["backend"] == OURS and row["source"] is llama["source"]}
        if all(name in ours and comparable(ours[name]) for name in ("llama", "stacked")):
            gains = [_gain(ours[name], llama) for name in ("llama", "stacked")]
            return (
                f"{MEGATRON[backend]} (backend {backend}): {_thousands(llama)} with Llama; "
                f"in the same run ours {gains[0]} with Llama, {gains[1]} with the Composite"
            )
    return None


def _beside_peer(rows: Sequence[Row], stacked: Row) -> str:
    """The peer's Llama in the same file, and how much faster the Composite is; nothing where there is none."""
    peer = rate(rows, backend=PEER, model="llama", source=stacked["source"])
    if peer is None or stacked["backend"] == PEER:
        return ""
    return f"; torch.compile's Llama {_thousands(peer)} (the Composite {_gain(stacked, peer)})"


def _thousands(row: Row) -> str:
    return f"{row['tokens_per_second'] / 1e3:.1f}k tokens/s"


def _mfu(row: Row) -> str:
    return f" (MFU {row['mfu']:.1%})" if row.get("mfu") else ""


def _inference_lines(results: Results, gpu: str) -> list[str]:
    rows = [row for row in results.inference if row["source"].gpu == gpu and row.get("graph")]
    lines = []
    for shape in sorted({row["shape"] for row in rows}):
        alone = [row for row in rows if row["shape"] == shape and row["batch"] == 1]
        if alone:
            shortest = min(row["context"] for row in alone)
            cells = {row["model"]: row for row in alone if row["context"] == shortest}
            times = ", ".join(f"{name} {1e3 * row['graph']:.2f} ms" for name, row in cells.items())
            lines.append(f"decoding {shape}, batch 1, {shortest:,} tokens of context: {times} a token")
        grown = [row for row in rows if row["shape"] == shape and row.get("advantage") and row["model"] != "llama"]
        if grown:
            gains = [row["advantage"] for row in grown]
            places = len({(row["batch"], row["context"]) for row in grown})
            lines.append(
                f"decoding {shape} over {places} cells of batch and context: the Composites x{min(gains):.2f} to "
                f"x{max(gains):.2f} as fast as Llama"
            )
    return lines


def _kernel_lines(results: Results, gpu: str) -> list[str]:
    measured = [verdict for verdict, source in results.kernels if source.gpu == gpu and verdict.seconds is not None]
    beside = [verdict.advantage for verdict in measured if verdict.advantage]
    fractions = [verdict.fraction for verdict in measured if verdict.fraction]
    if not measured:
        return []
    cases = {(verdict.op, verdict.case) for verdict in measured}
    line = f"kernels: {len({verdict.op for verdict in measured})} operations, {len(cases)} cases"
    if len(fractions) == len(measured):
        line += f", at {statistics.median(fractions):.0%} of the ceiling in the median"
    if beside:
        mean = math.exp(statistics.fmean(map(math.log, beside)))
        line += (
            f"; of {len(beside)} comparisons with the best peer {Tally.of(beside).says()} (geometric mean x{mean:.2f})"
        )
    return [line]


def _search_lines(results: Results, gpu: str) -> list[str]:
    rows = [row for row in results.search if row["source"].gpu == gpu and row["advantage"] and row["rows"] > 1]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        best = min((row for row in rows if row["case"] == case), key=lambda row: float(row["seconds"]))
        lines.append(
            f"search, {case}: {1 / best['seconds']:,.0f} candidate-steps/s with {best['rows']} candidates at once, "
            f"x{best['advantage']:.1f} those of one at a time"
        )
    studies = [row for row in results.studies if row["source"].gpu == gpu]
    return lines + [f"{row['study']}: {row['hours']:.1f} h, predicted from measured steps" for row in studies]


def update_readme(path: Path, text: str) -> bool:
    """Put `text` between the marks; returns whether that changed the file.

    Raises:
        FileError: If the file cannot be read, or has no marks.
    """
    before, _, after = split_readme(path)
    with naming(path, "read"):
        old = path.read_text(encoding="utf-8")
    new = f"{before}{BEGIN}\n{text}\n{END}{after}"
    if new != old:
        write_text(path, new)
    return new != old


def split_readme(path: Path) -> tuple[str, str, str]:
    """What stands before, between and after the marks.

    Raises:
        FileError: If the file cannot be read, or has no marks, or several.
    """
    with naming(path, "read"):
        text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise FileError(f"{path}: expected one line {BEGIN} and below it one line {END}, to put the figures between")
    before, _, rest = text.partition(BEGIN)
    between, _, after = rest.partition(END)
    return before, between.strip("\n"), after
