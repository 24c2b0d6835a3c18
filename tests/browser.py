"""A real browser without a screen: what it makes of a page."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"),
)
PROBE = """<script>
const letters = "p, td, th, dd, dt, figcaption";
document.querySelectorAll("details").forEach(one => one.open = true);
addEventListener("load", () => {  // the browser has all pictures by now, or has given them up
  const told = {
    pictures: document.images.length,
    broken: [...document.images].filter(image => !image.complete || image.naturalWidth === 0).length,
    width: document.documentElement.scrollWidth,
    window: innerWidth,
    smallest: Math.min(...[...document.querySelectorAll(letters)].map(e => parseFloat(getComputedStyle(e).fontSize))),
  };
  document.documentElement.setAttribute("data-told", btoa(JSON.stringify(told)));
});
</script></body>"""


@dataclass(frozen=True)
class Seen:
    pictures: int  # on the page
    broken: int  # of them cannot be shown
    width: int  # of the content, CSS px
    window: int  # CSS px
    smallest: float  # letters, CSS px
    console: list[str]  # what the page's console says


def open_page(page: Path, scratch: Path, width: int) -> Seen:
    """Opens a copy of a page from the disk in a window of this width; a script at its end tells what came of it."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian's package)")
    copy = scratch / f"probe-{width}.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    # a window of Chromium's is at least 500 px wide; a frame in it may be narrower
    frame = scratch / f"frame-{width}.html"
    told = "addEventListener('load', () => document.documentElement.setAttribute('data-told', "
    told += "document.querySelector('iframe').contentDocument.documentElement.getAttribute('data-told')))"
    frame.write_text(f'<iframe src="{copy.name}" style="border: 0; width: {width}px; height: 2000px"></iframe><script>{told}</script>')
    command = [CHROMIUM, *OPTIONS, "--allow-file-access-from-files", f"--user-data-dir={scratch / f'profile-{width}'}"]
    command += ["--window-size=1400,2100", "--virtual-time-budget=20000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<html[^>]*data-told="([^"]+)"', done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(**json.loads(base64.b64decode(found[1])), console=console)
