"""The page of results and the README's figures: what is read, what is said, and that nothing is typed."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from composer_megatron.bench.headline import BEGIN, END, headline, split_readme, update_readme
from composer_megatron.bench.lengths import at_ceilings, gains
from composer_megatron.bench.report import ratios, read_results
from composer_megatron.cli import main
from composer_megatron.commands.bench_report import measured
from composer_megatron.errors import FileError
from composer_search.report.benchmarks import build_page

ROOT = Path(__file__).parents[2]
PACKAGES = {"packages": {"torch": "2.11.0", "megatron-core": "0.19.2", "triton": "3.6.0", "apex": None}}


def training_row(model: str, backend: str, seq_len: int, rate: float | None, note: str = "") -> dict:
    row = {"shape": "1b", "model": model, "sequence": "9A18M", "backend": backend, "seq_len": seq_len, "note": note}
    row |= {"micro_batch": 1, "micro_batches": 1}
    if rate is not None:
        row |= {"tokens_per_second": rate, "median_seconds": seq_len / rate, "tflops": 500.0, "mfu": 0.5056}
        row |= {"spread": 0.01, "of_gemm_rate": 0.71, "peak_bytes": 43e9}
        attention = {"llama": 0.02, "stacked": 0.01}[model] * seq_len / 4096
        row |= {"breakdown": {"gemm": 0.02, "attention": attention, "idle": 0.03 - attention}, "ideal": {"gemm": 0.03}}
    return row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, values: dict) -> None:
        path = tmp_path / "nvidia-h100" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"gpu": "NVIDIA H100", "date": "2026-11-23", "environment": PACKAGES} | values))

    rows = [
        training_row("llama", "composer", 4096, 66_000.0),
        training_row("stacked", "composer", 4096, 72_600.0),
        training_row("llama", "compile", 4096, 59_000.0),
        training_row("stacked", "te", 4096, None, "TransformerEngine <is missing>"),
        training_row("llama", "composer", 8192, 50_000.0),
        training_row("stacked", "composer", 8192, 60_000.0),
    ]
    write("training-1b.json", {"ceilings": {"copy": 3.0e12, "gemm": 7.04e14}, "rows": rows})
    cells = [
        {"shape": "1b", "model": name, "sequence": "9A18M", "batch": batch, "context": 512, "graph": seconds}
        | {"advantage": advantage, "cache": 8, "cache_formula": 8, "note": "", "prefill": None}
        for name, batch, seconds, advantage in (
            ("llama", 1, 0.0011, 1.0), ("stacked", 1, 0.001, 1.1), ("stacked", 32, None, None)
        )
    ]  # fmt: skip
    write("inference-1b.json", {"rows": cells})
    kernels = [
        {"case": "forward", "name": name, "graph": seconds, "fraction": 0.9, "note": "", "bytes": 8}
        for name, seconds in (("composer", 1e-4), ("liger", 2e-4))
    ]
    write("kernel-swiglu.json", {"op": "swiglu", "ceilings_reached_by": {"copy": "add"}, "rows": kernels})
    steps = (
        ("one at a time, eager", 1, 0.008),
        ("population", 100, 0.04),
        ("population", 10, 0.008),
        ("lost", 9, None),
    )
    speeds = [{"case": "S=32", "contender": name, "rows": rows, "step": step} for name, rows, step in steps]
    study = {"study": "64 sequences", "tasks": [{"hours": 1.5}, {"hours": 0.25}]}
    write("search.json", {"speeds": speeds, "oracle": study, "study": None})
    write("notes.json", {"something": "else"})
    return tmp_path


def test_every_file_is_read_as_what_it_is(folder: Path) -> None:
    found = read_results(folder)
    assert [(source.file, source.kind) for source in found.sources] == [
        ("nvidia-h100/inference-1b.json", "inference"),
        ("nvidia-h100/kernel-swiglu.json", "kernel"),
        ("nvidia-h100/search.json", "search"),
        ("nvidia-h100/training-1b.json", "training"),
    ]
    assert found.ignored == ["nvidia-h100/notes.json"]
    assert (len(found.training), len(found.inference), len(found.kernels)) == (6, 3, 1)
    assert found.ceilings["NVIDIA H100"]["gemm"] == 7.04e14
    assert found.sources[-1].says() == "NVIDIA H100, torch 2.11.0, megatron-core 0.19.2, triton 3.6.0, 2026-11-23"
    curve = ratios(found.training, "NVIDIA H100", "1b", "composer", "stacked")
    assert curve == [(4096, pytest.approx(1.1)), (8192, pytest.approx(1.2))]


def test_rows_that_were_measured_in_several_runs_are_told_apart_by_their_file(folder: Path) -> None:
    """A bar names its file where another bar has the same model, backend and length; the table always does."""

    def bars(page: str) -> list[str]:
        return re.findall(r'class="bar-head"><span>(1b [^<]*)</span>', page)

    once = bars(build_page(measured(read_results(folder))))
    assert "1b llama, compile, 4,096 tokens" in once and not any(".json" in name for name in once)
    file = folder / "nvidia-h100/training-1b.json"
    again = json.loads(file.read_text())
    again["rows"] = [training_row("llama", "compile", 4096, 59_500.0)]
    (folder / "nvidia-h100/training-again.json").write_text(json.dumps(again))
    page = build_page(measured(read_results(folder)))
    twice = [name for name in bars(page) if "compile" in name]
    files = ("nvidia-h100/training-1b.json", "nvidia-h100/training-again.json")
    assert sorted(twice) == [f"1b llama, compile, 4,096 tokens, {name}" for name in files]
    assert sorted(bars(page)) == sorted(twice + [name for name in once if "compile" not in name])
    section = page.split("Training throughput</caption>")[1].split("</table>")[0]
    assert section.count(files[0]) == 6 and section.count(files[1]) == 1


def test_results_of_a_pair_are_still_read() -> None:
    found = read_results(ROOT / "benchmarks/results")
    old = [row for row in found.training if row["backend"] == "PyTorch modules"]
    assert {row["model"] for row in old} == {"llama", "stacked"}
    assert "H200" not in headline(found), "the headline is the backend composer's"


def test_headline_figures_follow_from_the_files(folder: Path) -> None:
    text = headline(read_results(folder))
    for wanted in (
        "**NVIDIA H100** (torch 2.11.0, triton 3.6.0, megatron-core 0.19.2; 2026-11-23)",
        "training 1b at 4,096 tokens: 72.6k tokens/s with the Composite, 66.0k tokens/s with Llama (x1.100), ",
        " and 500 (MFU 50.6%) TFLOP/s",
        "torch.compile's Llama 59.0k tokens/s (the Composite x1.231)",
        "training 1b by length, the Composite and its gain over Llama: 60.0k tokens/s at 8,192 (x1.200)",
        "decoding 1b, batch 1, 512 tokens of context: llama 1.10 ms, stacked 1.00 ms a token",
        "decoding 1b over 1 cells of batch and context: the Composites x1.10 to x1.10 as fast as Llama",
        "1 operations, 1 cases, at 90% of the ceiling",
        "of 1 comparisons with the best peer faster in 1, within 1 % in 0 and slower in 0 (geometric mean x2.00)",
        "search, S=32: 2,500 candidate-steps/s with 100 candidates at once, x20.0 those of one at a time",
        "64 sequences: 1.8 h, predicted from measured steps",
    ):
        assert wanted in text
    assert headline(read_results(folder / "nvidia-h100")) == text


def test_fractions_of_a_ceiling_that_was_measured_too_low_are_not_shown(folder: Path) -> None:
    file = folder / "nvidia-h100/kernel-swiglu.json"
    result = json.loads(file.read_text())
    del result["ceilings_reached_by"]
    file.write_text(json.dumps(result | {"ceilings": {"copy": 2.4e12}}))
    found = read_results(folder)
    assert found.kernels[0][0].fraction is None
    assert found.ceilings["NVIDIA H100"]["copy"] == 3.0e12
    assert "1 operations, 1 cases; of 1 comparisons" in headline(found)


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    assert headline(read_results(tmp_path)) == "Nothing has been measured yet."
    with pytest.raises(FileError, match="is no folder"):
        read_results(tmp_path / "none")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FileError, match=r"bad\.json"):
        read_results(tmp_path)


def test_the_readme_gets_the_figures_between_its_marks(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    assert update_readme(readme, "new\nlines")
    assert readme.read_text() == f"# A\n\n{BEGIN}\nnew\nlines\n{END}\n\nrest\n"
    assert split_readme(readme)[1] == "new\nlines"
    assert not update_readme(readme, "new\nlines")
    arguments = ["bench", "report", str(folder), "--readme", str(readme)]
    for changes, status in (([*arguments, "--check"], 1), (arguments, None), ([*arguments, "--check"], None)):
        if status is None:
            main(changes)
        else:
            with pytest.raises(SystemExit) as end:
                main(changes)
            assert end.value.code == status
    readme.write_text("no marks")
    with pytest.raises(FileError, match="expected one line"):
        split_readme(readme)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `bench report` says where it ends with status 1."""
    with pytest.raises(SystemExit) as end:
        main(["bench", "report", *arguments])
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())


def test_wrong_folders_and_files_are_one_message(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    assert "nowhere is no folder" in refused(capsys, str(tmp_path / "nowhere"), "--output", str(output))
    assert not output.exists()
    other = tmp_path / "CHANGELOG.md"
    other.write_text("# Changes\n")
    assert f"expected one line {BEGIN}" in refused(capsys, str(folder), "--readme", str(other))
    assert other.read_text() == "# Changes\n"
    assert "none.md" in refused(capsys, str(folder), "--readme", str(tmp_path / "none.md"))


@pytest.mark.parametrize("kind", ["--output", "--readme"])
def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """A mistaken folder must not replace a page, or the README's figures, by nothing."""
    results, target = tmp_path / "results", tmp_path / "target"
    results.mkdir()
    (results / "notes.json").write_text("{}")
    target.write_text(f"{BEGIN}\nfigures\n{END}\n")
    before = target.read_text()
    said = refused(capsys, str(results), kind, str(target))
    assert f"{results} holds no result of a benchmark: composer-megatron bench" in said
    assert target.read_text() == before


@pytest.mark.parametrize("result", [{"rows": []}, {"rows": [1]}, {"rows": [{"bytes_per_token": 8}]}, {"rows": None}])
def test_rows_of_no_known_kind_are_left_out(folder: Path, tmp_path: Path, result: dict) -> None:
    before = read_results(folder)
    (folder / "unknown.json").write_text(json.dumps(result))
    found = read_results(folder)
    assert found.ignored == ["nvidia-h100/notes.json", "unknown.json"]
    assert headline(found) == headline(before)
    main(["bench", "report", str(folder), "--output", str(tmp_path / "report.html")])


def trial(model: str, used: int | None) -> dict:
    """A batch as `kv --check` reports it."""
    row = {"shape": "1b", "model": model, "memory": 80 * 10**9, "holds": used is not None, "said": "", "others": 0}
    return row | {
        "batch": 68,
        "context": 32_768,
        "cache": 73_014_444_032,
        "cache_formula": 73_014_444_032,
        "used": used,
    }


def test_batches_that_were_allocated_are_shown(folder: Path) -> None:
    file = folder / "nvidia-h100/kv.json"
    trials = [trial("llama", 79_002_664_960), trial("stacked", None)]
    file.write_text(json.dumps({"rows": [{"shape": "1b"}], "trials": trials, "environment": PACKAGES}))
    found = read_results(folder)
    assert [row["source"].kind for row in found.cache] == ["cache", "cache"]
    page = build_page(measured(found))
    section = page[page.index("Checked by allocation") : page.index('id="kernels"')]
    body = section[section.index("<tbody>") :]
    lines = [re.sub(r"<[^>]+>", " ", line).split() for line in body.split("</tr>")][:2]
    assert [line[:2] + line[3:] for line in lines] == [
        ["1b", "llama", "32,768", "68", "80", "79.0", "73,014,444,032", "73,014,444,032", "yes"],
        ["1b", "stacked", "32,768", "68", "80", "out", "of", "memory", "73,014,444,032", "73,014,444,032", "no"],
    ]


def test_batches_of_two_gpus_stand_in_one_table(folder: Path) -> None:
    """Each with its GPU and the memory that it was to fit in, and no figure of the headline the worse for it."""
    before = headline(read_results(folder))
    for gpu, memory in (("NVIDIA H100", 80), ("NVIDIA H200", 141)):
        file = folder / gpu.lower().replace(" ", "-") / "kv.json"
        file.parent.mkdir(exist_ok=True)
        rows = [trial("llama", (memory - 1) * 10**9) | {"memory": memory * 10**9}]
        file.write_text(json.dumps({"trials": rows, "environment": PACKAGES | {"gpus": [{"name": gpu}]}}))
    found = read_results(folder)
    assert headline(found) == before
    page = build_page(measured(found))
    body = page.split("Batches that were allocated and decoded</caption>")[1].split("</table>")[0].split("<tbody>")[1]
    lines = [re.sub(r"<[^>]+>", " ", line).split() for line in body.split("</tr>")][:2]
    assert [(line[3], *line[6:8], line[-1]) for line in lines] == [
        ("H100", "80", "79.0", "yes"),
        ("H200", "141", "140.0", "yes"),
    ]


def test_requests_that_fit_are_those_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = build_page(measured(read_results(tmp_path)))
    main(["kv", "--contexts", "4096", "8192", "32768", "131072", "--json"])
    section = page[page.index("Bytes of the decoding cache") :]
    for row in json.loads(capsys.readouterr().out)["rows"]:
        cells = section.split(f">{row['shape']} {row['model']}</th>")[1].split("</tr>")[0]
        figures = [float(value) for value in re.findall(r'value="([^"]+)"', cells)]
        fits = [batch for by_context in row["batches"].values() for batch in by_context.values()]
        assert figures == [row["bytes_per_token"] / 1024, row["ratio"], *fits]


def test_latency_is_a_grid_of_batches_and_contexts(folder: Path) -> None:
    page = build_page(measured(read_results(folder)))
    grid = page.split("Decoding, ms a step: 1b, NVIDIA H100</caption>")[1].split("</table>")[0]
    body = grid.split("<tbody>")[1]
    lines = [re.sub(r"<[^>]+>", " ", line).split() for line in body.split("</tr>")][:3]
    assert lines == [["llama", "1", "1.100"], ["stacked", "1", "1.000", "x1.10"], ["stacked", "32", "–"]]


def test_the_readme_holds_the_figures_of_the_results() -> None:
    readme = ROOT / "README.md"
    if BEGIN not in readme.read_text(encoding="utf-8"):
        pytest.skip("the README has no marks for figures")
    assert split_readme(readme)[1] == headline(read_results(ROOT / "benchmarks/results")), (
        "run: composer-megatron bench report --readme README.md"
    )


def test_the_page_holds_every_row(folder: Path, tmp_path: Path) -> None:
    page = build_page(measured(read_results(folder)))
    for title in ("by sequence length", "Training throughput", "time goes", "Prefill and decoding", "Cache", "peers"):
        assert title in page
    assert "TransformerEngine &lt;is missing&gt;" in page
    exact = {float(value) for value in re.findall(r'<data value="([^"]+)">', page)}
    assert {66_000, 72_600, 59_000, 50_000, 60_000} <= exact
    assert "3 of 3 allocated caches" in page
    # 0.05 s of a step of 4096 tokens, and at the ceilings 0.03 s.
    assert {"12,207 ns a token", "7,324 ns a token"} <= set(re.findall(r"[0-9,]+ ns a token", page))
    output = tmp_path / "page/report.html"
    main(["bench", "report", str(folder), "--output", str(output)])
    assert "Benchmarks" in output.read_text(encoding="utf-8")


def test_a_page_without_figures_says_what_is_missing(tmp_path: Path) -> None:
    page = build_page(measured(read_results(tmp_path)))
    assert "Not measured" in page
    assert "no step was profiled" in page
    assert "Bytes of the decoding cache" in page  # exact counts need no GPU
    assert 'value="1.7777777777777777"' in page


@pytest.mark.browser
def test_the_page_in_a_browser(folder: Path, tmp_path: Path) -> None:
    import shutil

    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no Chromium")
    output = tmp_path / "report.html"
    output.write_text(build_page(measured(read_results(folder))), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", output.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<button") > 20  # the page's script ran: tables can be sorted


def test_products_in_8_bits_stand_below_the_backend_that_they_belong_to(folder: Path) -> None:
    file = folder / "nvidia-h100/training-1b.json"
    result = json.loads(file.read_text())
    rows = [row for row in result["rows"] if row["backend"] == "composer" and row["seq_len"] == 4096]
    faster = [
        row | {"backend": "composer+linear=fp8", "tokens_per_second": 1.25 * row["tokens_per_second"]} for row in rows
    ]
    file.write_text(json.dumps(result | {"rows": result["rows"] + faster}))
    said = next(line for line in headline(read_results(folder)).splitlines() if "in 8 bits" in line)
    assert (
        "the same with products in 8 bits (`linear=fp8`): 90.8k tokens/s (x1.250) and 82.5k tokens/s (x1.250)" in said
    )
    assert said.endswith("; torch.compile's Llama 59.0k tokens/s (the Composite x1.538)")


def test_a_variant_in_longer_steps_says_how_long(folder: Path) -> None:
    """More tokens a step are faster whatever computes them: the reader must know where steps differ from the usual."""
    file = folder / "nvidia-h100/training-1b.json"
    result = json.loads(file.read_text())
    name = "composer+linear=fp8"
    rows = [training_row("llama", name, 4096, 80_000.0), training_row("stacked", name, 4096, 90_000.0)]

    def line(**step: int) -> str:
        file.write_text(json.dumps(result | {"rows": result["rows"] + [row | step for row in rows]}))
        return next(line for line in headline(read_results(folder)).splitlines() if "in 8 bits" in line)

    assert "(`linear=fp8`): 90.0k" in line()
    assert "(`linear=fp8`) in steps of 32,768 tokens: 90.0k" in line(micro_batch=2, micro_batches=4)


@pytest.mark.parametrize(("backend", "name"), [("te", "TransformerEngine"), ("local", "PyTorch alone")])
def test_megatrons_backends_stand_beside_ours_of_the_same_run_or_not_at_all(
    folder: Path, backend: str, name: str
) -> None:
    def said() -> list[str]:
        return [line for line in headline(read_results(folder)).splitlines() if f"(backend {backend})" in line]

    llama = training_row("llama", backend, 4096, 60_000.0)
    other = folder / "nvidia-h100/training-2.json"
    other.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": [llama]}))
    assert said() == []  # ours are in the other file
    ours = [training_row("llama", "composer", 4096, 63_000.0), training_row("stacked", "composer", 4096, 69_000.0)]
    other.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": [llama, ours[0]]}))
    assert said() == []  # and so is our Composite
    other.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": [llama, *ours]}))
    assert said() == [
        f"- Megatron with {name} (backend {backend}): 60.0k tokens/s with Llama; "
        "in the same run ours x1.050 with Llama, x1.150 with the Composite"
    ]
    for unfair in ([llama | {"unfair": "unfused"}, *ours], [llama, ours[0], ours[1] | {"unfair": "unfused"}]):
        other.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": unfair}))
        assert said() == []


def test_bars_are_as_wide_as_the_page(folder: Path) -> None:
    """A drawing without a width is 300 pixels wide in every browser."""
    page = build_page(measured(read_results(folder)))
    bars = re.findall(r'<svg[^>]*class="strip"[^>]*>', page)
    assert len(bars) == 10  # each of five rows, and its ceilings
    assert all('style="width:100%"' in bar for bar in bars)


def test_ratios_of_the_headline_are_of_one_file(folder: Path) -> None:
    """Clocks differ between runs, and so may the size of the micro-batches."""
    rows = [
        training_row("llama", "composer", 4096, 99_000.0),  # alone in its file
        training_row("stacked", "composer+activation=quack", 4096, 75_000.0),
        training_row("llama", "composer+activation=quack", 4096, 70_000.0),
    ]
    (folder / "nvidia-h100/training-2.json").write_text(json.dumps({"gpu": "NVIDIA H100", "rows": rows}))
    text = headline(read_results(folder))
    assert "72.6k tokens/s with the Composite, 66.0k tokens/s with Llama (x1.100)" in text
    assert "within the products (`activation=quack`): 75.0k tokens/s and 70.0k tokens/s (x0.707)\n" in text


def test_of_several_runs_that_of_the_fastest_composite_counts_everywhere(folder: Path) -> None:
    """The page's curves and the README's lines must be of the same run, whatever the files are called."""
    rows = [training_row("llama", "composer", 4096, 60_000.0), training_row("stacked", "composer", 4096, 63_000.0)]
    before = read_results(folder)
    for name in ("training-0.json", "training-9.json"):
        (folder / "nvidia-h100" / name).write_text(json.dumps({"gpu": "NVIDIA H100", "rows": rows}))
    found = read_results(folder)
    assert ratios(found.training, "NVIDIA H100", "1b", "composer", "stacked")[0] == (4096, pytest.approx(1.1))
    assert gains(found.training) == gains(before.training)
    assert "72.6k tokens/s with the Composite, 66.0k tokens/s with Llama (x1.100)" in headline(found)


def test_rows_that_may_be_compared_to_none_are_shown_with_their_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row may be far too slow, and would then make a pair, a curve or the headline of a backend."""
    reason = "TransformerEngine computed attention unfused"
    rows = [training_row(model, "te", 4096, rate, reason) for model, rate in (("llama", 26e3), ("stacked", 37e3))]
    file = folder / "nvidia-h100/training-te.json"
    file.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": rows}))
    fair = read_results(folder)
    assert ratios(fair.training, "NVIDIA H100", "1b", "te", "stacked") == [(4096, pytest.approx(37 / 26))]
    assert fair.unfair == []
    file.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": [row | {"unfair": reason} for row in rows]}))
    found = read_results(folder)
    assert ratios(found.training, "NVIDIA H100", "1b", "te", "stacked") == []
    assert not any(gain.backend == "te" for gain in gains(found.training))
    assert any(gain.backend == "te" for gain in gains(fair.training))
    told = [row for row in found.training if row["backend"] == "te" and row.get("tokens_per_second")]
    assert [at_ceilings(row, found.training) for row in told] == [None, None]
    file.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": [rows[0], rows[1] | {"unfair": reason}]}))
    mixed = read_results(folder).training
    assert ratios(mixed, "NVIDIA H100", "1b", "te", "stacked") == []
    assert [at_ceilings(row, mixed) for row in mixed if row.get("unfair")] == [None]
    file.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": [row | {"unfair": reason} for row in rows]}))
    page = build_page(measured(found))
    assert "26,000" in page
    assert reason in page
    output = tmp_path / "page.html"
    main(["bench", "report", str(folder), "--output", str(output)])
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out of comparisons: 1b stacked, te, 4,096 tokens (nvidia-h100/training-te.json): {reason}" in said


def test_unfair_rows_alone_have_no_headline(tmp_path: Path) -> None:
    rows = [training_row("llama", "composer", 4096, 26e3), training_row("stacked", "composer", 4096, 37e3)]
    file = tmp_path / "training.json"
    file.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": rows}))
    assert "x1.423" in headline(read_results(tmp_path))
    file.write_text(json.dumps({"gpu": "NVIDIA H100", "rows": [row | {"unfair": "unfused"} for row in rows]}))
    assert headline(read_results(tmp_path)) == "Nothing has been measured yet."
