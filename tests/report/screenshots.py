# SPDX-License-Identifier: Apache-2.0
"""Takes the pictures of a report that the documents show.

python -m tests.report.screenshots RUN_DIR docs/report
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tests.report.browser import find_chromium, running_browser

# What is seen of the page, from its top, in pixels of the page.
VIEWS = {
    "desktop_light": ({"width": 1100}, 2600),
    "desktop_dark": ({"width": 1100, "dark": True}, 2600),
    "phone": ({"width": 390, "height": 844, "scale": 1.5}, 2400),
}
# So few colours are enough for flat ones, and half of the bytes.
NUM_COLOURS = 256


def take(report: Path, folder: Path) -> None:
    """Writes one picture for each view."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no Chromium is installed (apt-get install chromium)")
    folder.mkdir(parents=True, exist_ok=True)
    with running_browser(chromium) as browser:
        page = browser.new_page()
        for name, (screen, height) in VIEWS.items():
            page.look(**screen)
            page.open(report.resolve().as_uri())
            path = folder / f"{name}.png"
            page.screenshot(path, height=height)
            picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
            picture.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Takes the pictures of a report that the documents show.")
    parser.add_argument("run_dir", type=Path, help="folder of a run with its report.html")
    parser.add_argument("output", type=Path, help="folder of the pictures")
    options = parser.parse_args(arguments)
    take(options.run_dir / "report.html", options.output)


if __name__ == "__main__":
    main()
