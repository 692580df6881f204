"""Each page in a browser, read to its end: it asks nobody, it works, anybody can read it."""

import gzip
from pathlib import Path

import pytest

pytestmark = [pytest.mark.book, pytest.mark.browser]

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
BUDGET_BYTES = 1_500_000
COMPRESSED = (".html", ".js", ".css", ".json", ".svg")  # what hosts of static pages send as gzip
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
VIEW = "application/vnd.jupyter.widget-view+json"

FIGURES = ".cell_output .la:not(.needs-kernel)"
CONTROLS = "select, .noUi-handle"
# What a figure shows beside its controls: texts, colours and frames of all that is visible.
SEEN = """figure => [...figure.querySelectorAll("td, th, li, p, text, caption, polyline, circle")]
    .filter(part => part.checkVisibility())
    .map(part => [part.textContent, part.getAttribute("points"), part.getAttribute("cx"),
        getComputedStyle(part).boxShadow].join())
    .join("|")"""
# Where the whole page is wider than the screen, or a part is and no box around it scrolls.
STICKS_OUT = """() => {
    const width = document.documentElement.clientWidth, found = [];
    const whole = document.scrollingElement.scrollWidth;
    if (whole > width) found.push(`the page is ${whole} pixels wide`);
    for (const part of document.querySelectorAll("main *")) {
        const box = part.getBoundingClientRect();
        if (box.right <= width + 1 || !box.height || !part.checkVisibility()) continue;
        const aside = "mjx-assistive-mml, .bd-sidebar-secondary";  // for screen readers; off screen
        let around = part, boxed = Boolean(part.closest(aside));
        while (!boxed && around && around.tagName !== "MAIN") {
            const overflow = getComputedStyle(around).overflowX;
            boxed = ["auto", "scroll"].includes(overflow)
                && around.getBoundingClientRect().right <= width + 1;
            around = around.parentElement;
        }
        if (!boxed) found.push(`${part.outerHTML.slice(0, 120)} ends at ${Math.round(box.right)}`);
    }
    return found;
}"""


def test_nothing_leaves_the_site_and_nothing_fails(read):
    assert read.faults == []


def test_a_chapter_is_light(chapter):
    """What a first visit fetches when all is read: the page, scripts, styles and fonts.

    Texts count as they travel, compressed with gzip; pictures beside the page do not count, those
    inside it do.
    """
    sizes = {}
    for address in chapter.addresses:
        path = HTML / address.removeprefix(chapter.base).partition("?")[0].lstrip("/")
        if path.suffix not in PICTURES and not address.startswith(("data:", "blob:")):
            body = path.read_bytes()
            sizes[path.name] = len(gzip.compress(body, 6) if path.suffix in COMPRESSED else body)
    assert any(name.endswith(".js") for name in sizes)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(sizes.values()) < BUDGET_BYTES, f"{sum(sizes.values())} bytes; the most: {largest}"


def test_every_figure_is_drawn(chapter):
    places = chapter.page.evaluate(
        """kind => [...document.querySelectorAll(`script[type="${kind}"]`)].map(script => ({
            id: JSON.parse(script.textContent).model_id,
            drawn: script.parentElement.querySelectorAll(".jupyter-widgets").length,
        }))""",
        VIEW,
    )
    assert [place["id"] for place in places if not place["drawn"]] == []
    assert chapter.page.locator(".first-frame").count() == 0
    notebook = ROOT / "chapters" / (Path(chapter.page.url).stem + ".ipynb")
    stored = notebook.read_text(encoding="utf-8").count(f'"{VIEW}": {{')
    assert len(places) == stored


def test_every_formula_is_set(chapter):
    formulas = chapter.page.evaluate(
        """() => [...document.querySelectorAll(".math.notranslate")]
            .filter(place => !place.querySelector("mjx-container mjx-math"))
            .map(place => place.textContent)"""
    )
    assert formulas == []
    assert chapter.page.locator("mjx-container").count() > 0, "a chapter without a formula"
    assert chapter.page.locator("mjx-merror, [data-mjx-error]").count() == 0


def test_every_control_works_by_keyboard(chapter):
    dead = []
    for figure in chapter.page.locator(FIGURES).all():
        for control in figure.locator(CONTROLS).all():
            if not control.is_visible():
                continue
            before = figure.evaluate(SEEN)
            there, back = ("ArrowDown", "ArrowUp")
            value = "control => control.value ?? control.getAttribute('aria-valuenow')"
            start = control.evaluate(value)
            control.focus()
            control.press(there)
            if control.evaluate(value) == start:  # it stood at its end
                there, back = back, there
                control.press(there)
            after = figure.evaluate(SEEN)
            control.press(back)
            name = control.evaluate(
                "c => c.closest('.widget-inline-hbox, label').innerText.split('\\n')[0]"
            )
            if before == after:
                dead.append(f"{name} shows the same at its next value")
            if figure.evaluate(SEEN) != before:
                dead.append(f"{name} does not come back")
    assert dead == []


def test_help_opens_by_keyboard(chapter):
    folds = chapter.page.locator("details.hint, details.solution")
    assert folds.count() > 0, "a chapter without exercises"
    assert chapter.page.locator("details.hint[open], details.solution[open]").count() == 0
    for kind in ("hint", "solution"):
        fold = chapter.page.locator(f"details.{kind}").first
        inside = fold.locator(":scope > :not(summary)").first
        assert not inside.is_visible()
        fold.locator("summary").focus()
        chapter.page.keyboard.press("Enter")
        assert inside.is_visible() and inside.inner_text().strip()
        chapter.page.keyboard.press("Enter")
        assert not inside.is_visible()


def test_pictures_keep_their_white_ground_in_the_dark(chapter):
    """Plots have dark text on white; those in interactive figures (.la) have no text in them."""
    chapter.theme("dark")
    grounds = chapter.page.evaluate(
        """() => [...document.querySelectorAll("main .cell_output img, main figure img")]
            .filter(picture => !picture.closest(".la"))
            .map(picture => getComputedStyle(picture))
            .map(style => [style.backgroundColor, style.filter].join())"""
    )
    assert set(grounds) <= {"rgb(255, 255, 255),none"}


def test_nothing_sticks_out_on_a_phone(read):
    read.page.set_viewport_size(read.PHONE)
    read.page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    try:
        assert read.page.evaluate(STICKS_OUT) == []
    finally:
        read.page.evaluate("document.querySelectorAll('details').forEach(f => f.open = false)")


def test_accessibility(read):
    """axe-core finds nothing of any impact, with all folds open."""
    read.page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert read.violations() == []
