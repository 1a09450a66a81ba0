"""README and docs are tests: every command runs, every Python block runs, every link leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The shell commands of all bash blocks: comments dropped, continued lines joined."""
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


COMMANDS = commands(README)
TOUR = [command for command in COMMANDS if not command.startswith("make") and "…" not in command]
"""What a reader can paste; an ellipsis marks a command of the reader's own."""


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(str(ROOT / part) for part in (".", "kernels", "search")),
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root to relative paths, with a fresh runs/."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", TOUR)
def test_tour(command: str, checkout: Path) -> None:
    """In order: each command finds what the ones before it left."""
    done = shell(command, checkout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for output in re.findall(r"--output (\S+)", command):
        assert (checkout / output).exists()


def test_tour_covers_every_stage() -> None:
    verbs = {command.split()[1] for command in TOUR if command.startswith("composer-megatron")}
    assert verbs >= {"search", "aggregate", "extrapolate", "plan", "train", "eval", "generate", "export", "report"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", "".join(blocks(README, "bash"))))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_flags_for_your_own_pipeline(tmp_path: Path) -> None:
    (line,) = (command for command in COMMANDS if command.startswith("composer-megatron flags"))
    architecture = "composer-megatron extrapolate 2A4M --shape tiny --match parameters --output runs/composite.json"
    done = shell(f"{architecture} > /dev/null && {line}", tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("runs/*.flags")
    assert f"$(cat {written.relative_to(tmp_path)})" in README
    found = written.read_text()
    assert re.search(r"--hybrid-layer-pattern=[*|-]+", found).group().replace("|", "").endswith("=**----")
    assert "--spec composer_megatron.specs composite_stack_spec" in found


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_python_blocks(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_extrapolation_table() -> None:
    """Each cell of the table is what the library says."""
    from composer_megatron.sequence import CompositeSequence
    from composer_megatron.shape import PRESETS
    from composer_search.extrapolate import extrapolate

    rows = re.findall(r"^\| (350m|1b|3b|8b) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["350m", "1b", "3b", "8b"]
    for name, llama, stacked, stretched, kv in rows:
        short, long = CompositeSequence.parse("2A4M"), CompositeSequence.parse("2A5M2A3M1A3M")
        grown = [extrapolate(short, PRESETS[name]), extrapolate(long, PRESETS[name], method="stretch")]
        cells = ["{A}A {M}M".format(**each.sequence.counts) for each in (grown[0].baseline(), *grown)]
        assert cells == [llama, stacked, stretched.partition(":")[0]]
        assert kv == ", ".join(f"{each.summary(4096)['kv_ratio']:.3f}" for each in grown)
        if ":" in stretched:
            assert stretched.partition(":")[2].strip(" `") == str(grown[1].sequence)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_paths_named_in_code_font_exist() -> None:
    for name in re.findall(r"`((?:docs|tools|tests|composer_megatron|search)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
