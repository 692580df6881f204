"""Take the picture of the README, assets/screenshot.png, from the built book.

    make book
    python tools/screenshot.py

It shows the first interactive figure of the first chapter with the text around it, at 1280 pixels.
Chromium is searched for on the PATH, or is what CHROMIUM names.
"""

import functools
import http.server
import io
import os
import shutil
import sys
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
TARGET = ROOT / "assets" / "screenshot.png"
SIZE = {"width": 1280, "height": 800}
ABOVE = 76  # pixels that stay over the figure: the header of the page, and some air
COLOURS = 128
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing about each file."""


def take(address: str, browser: str) -> Image.Image:
    """Return the picture of a chapter, scrolled to its first figure."""
    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=browser)
        page = window.new_page(viewport=SIZE, color_scheme="light", reduced_motion="reduce")
        page.goto(address)
        page.evaluate("MathJax.startup.promise.then(() => null)")
        figure = page.locator(".first-frame").first
        figure.scroll_into_view_if_needed()
        page.wait_for_function("() => !document.querySelector('.first-frame')")
        page.locator(".cell_output .la").first.evaluate(
            "(box, above) => scrollTo(0, scrollY + box.getBoundingClientRect().top - above)", ABOVE
        )
        page.wait_for_timeout(500)  # the header hides while the page scrolls
        shot = page.screenshot()
        window.close()
    return Image.open(io.BytesIO(shot)).convert("RGB")


def main() -> None:
    chapters = sorted(HTML.glob("chapters/*.html"))
    if not chapters:
        sys.exit("there are no built pages: run `make book` first")
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not browser:
        sys.exit("there is no Chromium: install it, or set CHROMIUM to its path")
    handler = functools.partial(Handler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/chapters/{chapters[0].name}"
        picture = take(address, browser)
        server.shutdown()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(TARGET, optimize=True)
    print(f"{TARGET.relative_to(ROOT)}: {picture.width} × {picture.height} pixels, "
          f"{TARGET.stat().st_size / 1000:.0f} kB")  # fmt: skip


if __name__ == "__main__":
    main()
