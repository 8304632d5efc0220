"""Take a picture of a page of ours in Debian's Chromium, as README and docs show it.

python tools/screenshot.py .demo/report.html docs/report.png
python tools/screenshot.py PAGE PICTURE --width 400 --dark

A page that Chromium reports an error of has no picture: exit code 1.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import exit_code, leave


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="file of the page")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--width", type=int, default=1200, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=1500, help="of the picture, in pixels")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with sync_playwright() as library:
        program = shutil.which("chromium")
        browser = library.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(options.page.resolve().as_uri())
        page.wait_for_function("document.querySelectorAll('[data-chart] canvas').length > 0")
        page.wait_for_timeout(500)  # the charts are painted in the frame that follows
        page.screenshot(path=options.picture)
        browser.close()
    print("\n".join(wrong) or options.picture, file=sys.stderr if wrong else sys.stdout)
    return int(bool(wrong))


if __name__ == "__main__":
    leave(exit_code(main, "screenshot"))
