"""The built book on a server of its own, and one Chromium that can reach nothing else."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
# No name resolves but the server's: whatever a page asks another host for fails, and is recorded.
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
AXE = ROOT / "tests" / "book" / "offline" / "axe.min.js"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 375, "height": 800}
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
TIMEOUT_MS = 30_000

# The figures' scripts start when a figure comes near the screen; the reader scrolls to each.
READ_TO_THE_END = """async () => {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    for (const frame of document.querySelectorAll(".first-frame")) frame.scrollIntoView();
}"""
DRAWN = "() => !document.querySelector('.first-frame')"

# Thousands of spans of code have a dozen colours: each colour is looked at once on each ground.
ONE_OF_EACH_COLOUR = """() => {
    const seen = new Set();
    for (const span of document.querySelectorAll("pre span[class]")) {
        const key = `${span.closest(".highlight")?.parentElement.className} ${span.className}`;
        if (span.children.length || !span.textContent.trim()) continue;
        if (seen.has(key)) span.replaceWith(span.textContent);
        seen.add(key);
    }
    document.querySelectorAll("pre").forEach(pre => pre.normalize());
}"""
RUN_AXE = """async rules => {
    const options = {resultTypes: ["violations"]};
    if (rules) options.runOnly = {type: "rule", values: rules};
    const {violations} = await axe.run(document, options);
    return violations.map(({id, impact, nodes}) =>
        `${id} (${impact}), ${nodes.length} times: ${nodes[0].html.slice(0, 200)} | `
        + nodes[0].failureSummary.replace(/\\s+/g, " "));
}"""


@dataclass
class Visit:
    """A page in the browser, and what went wrong while it was there."""

    DESKTOP = DESKTOP
    PHONE = PHONE

    page: Page
    base: str
    faults: list[str] = field(default_factory=list)
    addresses: set[str] = field(default_factory=set)  # of everything that the page asked for

    def __post_init__(self) -> None:
        self.page.on("request", self._request)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))
        self.page.on("requestfailed", lambda r: self.faults.append(f"failed: {r.url}"))
        self.page.on("response", self._response)

    def _request(self, request) -> None:
        self.addresses.add(request.url)
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.faults.append(f"asks another host: {request.url}")

    def _console(self, message) -> None:
        if message.type == "error":
            self.faults.append(f"console: {message.text}")

    def _response(self, response) -> None:
        if response.status >= 400:
            self.faults.append(f"{response.status}: {response.url}")

    def read(self, path: str) -> "Visit":
        """Open a page and wait until its formulas are set and its figures drawn."""
        self.page.goto(f"{self.base}/{path}", wait_until="load")
        self.page.add_style_tag(content=STILL)
        self.page.evaluate(READ_TO_THE_END)
        self.page.wait_for_function(DRAWN)
        self.page.evaluate("scrollTo(0, 0)")
        return self

    def theme(self, name: str) -> None:
        """Change the system's colours, which the page follows."""
        self.page.emulate_media(color_scheme=name)
        self.page.wait_for_function(
            "name => document.documentElement.dataset.theme === name", arg=name
        )

    def violations(self) -> list[str]:
        """What axe-core finds, of any impact, in light and dark, on a desktop and on a phone.

        Between light and dark only colours differ, so in the dark only the rules on colour run.
        """
        self.page.evaluate(ONE_OF_EACH_COLOUR)
        self.page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
        found = []
        for size in (DESKTOP, PHONE):
            self.page.set_viewport_size(size)
            for theme, rules in (("light", None), ("dark", ["color-contrast"])):
                self.theme(theme)
                where = f"{size['width']} pixels, {theme}"
                found += [f"{where}: {fault}" for fault in self.page.evaluate(RUN_AXE, rules)]
        return found


@dataclass
class Site:
    """The pages under an address; `extra` holds pages that a test makes itself."""

    base: str
    extra: dict[str, str]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files without a line for each, and the extra pages."""

    protocol_version = "HTTP/1.1"
    extra: dict[str, str]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        page = self.extra.get(self.path.partition("?")[0])
        if page is None:
            super().do_GET()
            return
        body = page.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    assert (HTML / "index.html").is_file(), f"no pages under {HTML}: run `make book` first"
    extra: dict[str, str] = {}
    handler = functools.partial(type("Pages", (Quiet,), {"extra": extra}), directory=str(HTML))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Site(f"http://127.0.0.1:{server.server_port}", extra)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert found, "no Chromium: install it, or set CHROMIUM to its path"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[NOWHERE])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One cache for all pages, as a reader has it."""
    context = browser.new_context(viewport=DESKTOP, color_scheme="light")
    context.set_default_timeout(TIMEOUT_MS)
    yield context
    context.close()


@pytest.fixture(scope="session")
def make_visit(site: Site) -> Callable[[Page], Visit]:
    return lambda page: Visit(page, site.base)


@pytest.fixture
def visit(context: BrowserContext, site: Site) -> Iterator[Visit]:
    """A fresh, empty page."""
    page = context.new_page()
    yield Visit(page, site.base)
    page.close()


@pytest.fixture(scope="module")
def reading(request: pytest.FixtureRequest, context: BrowserContext, site: Site) -> Iterator[Visit]:
    """A page of the book, read to its end once for all tests of a module."""
    page = context.new_page()
    yield Visit(page, site.base).read(request.param)
    page.close()


@pytest.fixture
def read(reading: Visit) -> Visit:
    """The page that was read, on a desktop in the light, whatever the test before did to it."""
    reading.page.set_viewport_size(DESKTOP)
    reading.theme("light")
    return reading


@pytest.fixture(scope="session")
def soup() -> Callable[[str], BeautifulSoup]:
    """The parsed source of a page."""

    @functools.cache
    def parse(path: str) -> BeautifulSoup:
        return BeautifulSoup((HTML / path).read_text(encoding="utf-8"), "html.parser")

    return parse


def names(*patterns: str) -> list[str]:
    """Paths of pages that are there, relative to the book's root."""
    found = (path for pattern in patterns for path in HTML.glob(pattern))
    return sorted(path.relative_to(HTML).as_posix() for path in found)


CHAPTERS = names("chapters/*.html")
PAGES = [*CHAPTERS, "index.html", *names("reference/*.html")]


@pytest.fixture
def chapter(read: Visit) -> Visit:
    """A chapter that was read: `read`, for tests that ask nothing of the other pages."""
    return read


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for each page, or for each chapter."""
    if "reading" in metafunc.fixturenames:
        chosen = CHAPTERS if "chapter" in metafunc.fixturenames else PAGES
        metafunc.parametrize("reading", chosen, indirect=True, scope="module")
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", PAGES)
    if "chapter_path" in metafunc.fixturenames:
        metafunc.parametrize("chapter_path", CHAPTERS)
