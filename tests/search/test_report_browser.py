"""The report in a browser: no error, no overflow at any width, tables that sort, charts that answer the pointer."""

import json
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from composer_search.report import ReportInputs, build_report, write_report
from tests.search.report_demo import TASKS, hostile, parse, write_all

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]

LISTEN = """<script>
addEventListener("error", event => parent.problems.push("error: " + event.message));
addEventListener("unhandledrejection", event => parent.problems.push("rejection: " + event.reason));
for (const kind of ["error", "warn"]) console[kind] = (...words) => parent.problems.push(kind + ": " + words.join(" "));
</script>"""

PROBE = """
function move(target, share) {
  const box = target.getBoundingClientRect(), kind = target.ownerDocument.defaultView.PointerEvent;
  const place = { clientX: box.left + share * box.width, clientY: box.top + box.height / 2, bubbles: true };
  target.dispatchEvent(new kind("pointermove", place));
}
function probe(frame) {
  const page = frame.contentDocument, width = frame.clientWidth, tip = page.getElementById("tip"), found = {};
  for (const closed of page.querySelectorAll("details")) closed.open = true;
  const inside = element => !element.closest(".scroll table, svg, #tip");
  found.overflow = page.documentElement.scrollWidth - width;
  found.outside = Array.from(page.body.querySelectorAll("*")).filter(inside)
    .filter(element => element.getBoundingClientRect().right > width + 0.5)
    .map(element => element.tagName + "." + element.className);
  found.charts = Array.from(page.querySelectorAll(".chart, .strips > svg"))
    .map(each => each.getBoundingClientRect()).map(box => [box.width, box.height]);
  found.columns = Array.from(page.querySelectorAll("[data-sortable] thead button")).map(function (button, index) {
    button.click();
    const rows = page.querySelectorAll("[data-sortable] tbody tr");
    return Array.from(rows).map(row => row.cells[index].querySelector("data")).map(data => data && Number(data.value));
  });
  found.sorts = page.querySelectorAll("[aria-sort]").length;
  found.tips = [];
  for (const target of page.querySelectorAll("[data-series], .chart .place .glyph")) {
    move(target, 0.5);
    found.tips.push(tip.hidden ? "" : tip.textContent);
    target.dispatchEvent(new frame.contentWindow.PointerEvent("pointerleave"));
    found.tips.push(tip.hidden);
  }
  return found;
}
addEventListener("load", function () {
  const found = Array.from(document.querySelectorAll("iframe")).map(probe);
  document.body.textContent = JSON.stringify({ problems: problems, pages: found });
});
"""


def browse(tmp_path: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    quiet += ["--disable-gpu", "--disable-quic", "--hide-scrollbars", "--blink-settings=preferredColorScheme=1"]
    command = [BROWSER, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}", *flags]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ReportInputs:
    return write_all(tmp_path_factory.mktemp("demo"))


def test_runs_without_errors_and_fits_any_width(inputs, tmp_path):
    (tmp_path / "hostile").mkdir()
    whole, evil = build_report(inputs), build_report(hostile(inputs, tmp_path / "hostile"))
    shown = [(whole, 1280), (whole, 400), (evil, 1280), (evil, 400), (build_report(ReportInputs()), 400)]
    listening = [(escape(page.replace("<head>", "<head>" + LISTEN)), width) for page, width in shown]
    frames = "".join(
        f'<iframe width={width} height=900 style="border:0" srcdoc="{page}"></iframe>' for page, width in listening
    )
    outer = f"<!doctype html><meta charset=utf-8><body><script>const problems = [];{PROBE}</script>{frames}"
    (tmp_path / "outer.html").write_text(outer, encoding="utf-8")
    done = browse(tmp_path, tmp_path / "outer.html", "--enable-logging=stderr", "--v=0", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    found = json.loads(parse(done.stdout).all("body")[0].text)
    assert found["problems"] == []
    for (_, width), page in zip(shown, found["pages"], strict=True):
        assert (page["overflow"], page["outside"]) == (0, []), f"at {width} pixels"
        assert all(wide > 20 and high > 10 for wide, high in page["charts"])
        for column in page["columns"]:
            values = [value for value in column if value is not None]
            assert values in (sorted(values), sorted(values, reverse=True))
    desk = found["pages"][0]
    assert desk["sorts"] == 1 and len(desk["columns"]) == 5 + len(TASKS) + 2
    assert all(desk["tips"]) and len(desk["tips"][::2]) > 24 * len(TASKS)
    tips = "\n".join(desk["tips"][::2])
    assert "Trial 11: failed" in tips and "baseline, validation: " in tips and "at step 200" in tips


def test_is_not_blank(inputs, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="no Pillow to read the screenshot with")
    write_report(inputs, tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    browse(tmp_path, tmp_path / "report.html", f"--screenshot={shot}", "--window-size=1000,1600")
    with image.open(shot) as picture:
        colours = {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 20)}
        assert picture.size == (1000, 1600)
    assert len(colours) > 100
    # Attention's blue and the MLP's amber, as the style sheet has them.
    assert colours[0x2F, 0x5F, 0xB3] > 5000 and colours[0xE9, 0xA9, 0x3C] > 5000
