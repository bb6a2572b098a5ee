"""``python -m tests.loadtest.browser.screenshot JSON PNG``: a comparison's report as a picture."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from loadtest.compare import document
from loadtest.compare.judge import judge
from loadtest.report.compare import render
from tests.loadtest.browser.chromium import launched, opened


def main() -> None:
    """Opens the report of the document in Chromium and saves a picture of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="a document of longspan compare")
    parser.add_argument("png", type=Path, help="the picture")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light", help="colors of the page")
    parser.add_argument("--width", type=int, default=1200, help="of the window")
    parser.add_argument("--height", type=int, default=1400, help="of what is kept, from the top; 0: all")
    arguments = parser.parse_args()
    comparison = document.load(arguments.json)
    with tempfile.TemporaryDirectory() as folder, launched() as browser:
        file = Path(folder) / "report.html"
        file.write_text(render(comparison, judge(comparison)), encoding="utf-8")
        size = (arguments.width, arguments.height or 900)
        with opened(browser, file.as_uri(), size, arguments.scheme) as page:
            page.screenshot(path=str(arguments.png), full_page=not arguments.height)
            if page.faults:
                raise SystemExit("\n".join(page.faults))


if __name__ == "__main__":
    main()
