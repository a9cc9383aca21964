"""The report in a real browser, offline: no console errors, every picture loaded, light and dark."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from qwen_fused.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# asked of the page itself, once everything is there
PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images], svgs = [...document.querySelectorAll("svg")];
  const answer = {
    images: images.length,
    broken: images.filter(i => !i.complete || !i.naturalWidth).length,
    svgs: svgs.length,
    flat: svgs.filter(s => s.getBoundingClientRect().height < 50).length,
    wide: document.documentElement.scrollWidth > innerWidth,
    ink: getComputedStyle(document.body).color,
  };
  const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20 }));
  answer.read = plot.querySelector("output")?.textContent;
  document.title = "probe" + JSON.stringify(answer);
});
</script>
"""


def browse(page: Path, profile: Path, *flags: str) -> tuple[dict, str]:
    """What the page answers, and what the browser's console said."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--window-size=1300,900", *flags, "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.skip("the browser did not answer within two minutes")
    return json.loads(re.search(r"<title>probe(.*?)</title>", out)[1]), err


# of the page of a solve: what each control leaves, in what order
CONTROLS = """
<script>
addEventListener("load", () => {
  const images = [...document.images], said = {};
  const ask = (name, id, value) => {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event("input"));
    const left = [...document.querySelectorAll(".task:not([hidden])")].map(task => task.dataset.id);
    said[name] = [left, document.getElementById("shown").textContent];
  };
  said.images = images.length;
  said.broken = images.filter(i => !i.complete || !i.naturalWidth).length;
  said.wide = document.documentElement.scrollWidth > innerWidth;
  ask("surest", "order", "sure:-1");
  ask("least", "order", "sure:1");
  ask("large", "order", "side:-1");
  ask("by id", "order", "id:1");
  ask("failed", "state", "failed");
  ask("all", "state", "");
  ask("found", "find", "K1");
  document.title = "probe" + JSON.stringify(said);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1300, 500])
def test_solve_page_in_a_browser(tmp_path, width):
    from forked_workers import answer_of, make_task

    from qwen_fused.solver.page import write_page
    from qwen_fused.solver.results import TaskResult, digest, fallback
    from qwen_fused.solver.solution import Solution

    tasks = [make_task("task2", tests=2), make_task("task1", side=30), make_task("task4", answers=False)]
    results = {task.id: TaskResult(answer_of(task), digest(task)) for task in tasks}
    broken = make_task("task6")
    page = tmp_path / "page.html"
    write_page(page, Solution((*tasks, broken), results | {"task6": fallback(broken, "it broke")}))
    text = page.read_text()
    page.write_text(text.replace("</body>", CONTROLS + "</body>"))
    said, console = browse(page, tmp_path / "profile", f"--window-size={width},900")
    assert "CONSOLE" not in console, console
    assert said["images"] == text.count("<img ") > 30 and said["broken"] == 0 and not said["wide"]
    assert said["surest"] == [["task2", "task4", "task1", "task6"], "4 tasks"]
    assert said["least"][0] == ["task6", "task1", "task2", "task4"]
    assert said["large"][0][0] == "task1" and said["by id"][0] == ["task1", "task2", "task4", "task6"]
    assert said["failed"] == [["task6"], "1 of 4 tasks"] and said["all"][1] == "4 tasks"
    assert said["found"] == [["task1"], "1 of 4 tasks"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_report_in_a_browser(tmp_path, report_run):
    report = write_report(report_run)
    text = report.read_text()
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", PROBE + "</body>"))
    light, console = browse(page, tmp_path / "profile")
    assert "CONSOLE" not in console, console
    assert light["images"] == text.count("<img ") > 50 and light["broken"] == 0
    # eight curves, the gradient by layer, sizes and tasks
    assert light["svgs"] == 11 and light["flat"] == 0 and not light["wide"]
    assert light["read"].startswith("batch ")
    page.write_text(page.read_text().replace("</body>", "<script>nothing()</script></body>"))
    dark, console = browse(page, tmp_path / "profile-2", "--blink-settings=preferredColorScheme=0")
    assert "CONSOLE" in console, "an error in the page is seen"
    assert dark["ink"] != light["ink"] and dark["broken"] == 0
