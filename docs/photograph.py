"""Pictures of the pages that a run writes, in light and dark colours: images/NAME-light.png, -dark.png.

  tokens     the demonstration's page: `make demo`, then out/demo/tokens.html
  inspect    the gains and the quadrants of a report of `opd-inspect --trained ...`

Run: .venv/bin/python -m docs.photograph tokens out/demo/tokens.html (from the repository's root; needs chromium)
Not here: the pages (opd_ops/diagnostics/), pictures that need no browser (draw.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DARK = "@media(prefers-color-scheme:dark)"  # in the pages' style


class Shot(NamedTuple):
    width: int  # pixels of the window
    height: int
    style: str = ""  # more CSS: what is not shown
    script: str = ""


SHOTS = {
    "tokens": Shot(
        1100,
        782,
        style="dl { display: none }",
        script="document.querySelectorAll('.t.sel:not(.demo)')[6].focus({preventScroll: true})",  # the card with its numbers
    ),
    "inspect": Shot(
        1100,
        1120,
        style="h1, dl, .wide, section:not(:nth-of-type(1), :nth-of-type(3)) { display: none }"
        "section:nth-of-type(3) > :is(h2, .how) { display: none } h2 { margin-top: 0 }",
    ),
}


def photograph(name: str, page: Path, folder: Path = DOCS / "images") -> None:
    """Two pictures of a page, whose own scheme for dark colours is switched on or off."""
    shot, browser = SHOTS[name], next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"browser: got none, expected one of {', '.join(BROWSERS)} on the path; install chromium")
    html = page.read_text(encoding="utf-8")
    assert DARK in html, page
    with tempfile.TemporaryDirectory() as place:
        for scheme, media in (("light", "@media not all"), ("dark", "@media all")):
            copy, picture = Path(place, "page.html"), folder / f"{name}-{scheme}.png"
            added = f"<style>{shot.style}</style><script>{shot.script}</script></body>"
            copy.write_text(html.replace(DARK, media).replace("</body>", added), encoding="utf-8")
            options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={place}/profile")
            size = f"--window-size={shot.width},{shot.height}"
            subprocess.run([browser, *options, size, f"--screenshot={picture}", copy.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    photograph(sys.argv[1], Path(sys.argv[2]))
