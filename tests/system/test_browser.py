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
