"""results/index.html in a real browser: no error, no request, filters, keyboard, phone width, dark mode, print.

Skipped with the reason where no browser is installed and none can be fetched (`browser`). Screenshots are
left in the folder that $OPUS_BENCH_SCREENSHOTS names, else in pytest's temporary folder.
"""

import os
from pathlib import Path

import browser
import pytest
from test_report import REPORTED, grid, record_of, written
from test_site import HOSTILE, ROOT

from opus_bench import report, results
from opus_bench.site import page as site

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.network  # may fetch the browser
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1440, "height": 1000}
PAGE = ROOT / "results" / "index.html"


@pytest.fixture(scope="module")
def chromium():
    try:
        path = browser.find()
    except browser.Missing as reason:
        pytest.skip(str(reason))
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--headless", "--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(chromium):
    """visit(path, **options of the context) -> page; whatever the page logs or asks for fails the test."""
    contexts, said = [], []

    def go(path=PAGE, hash="", **options):
        context = chromium.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce"} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri() + hash)
        return page

    yield go
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("OPUS_BENCH_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name,viewport", [("phone", PHONE), ("desktop", DESKTOP)])
def test_the_page_fits_the_screen_and_its_text_can_be_read(visit, shots, name, viewport, scheme):
    page = visit(viewport=viewport, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    wide = page.evaluate("""() => [...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, .choices")
        && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))""")
    assert wide == []
    for selector in ("body", ".note", ".caution", "tbody td", ".kicker", "figcaption", "thead th", "a", "td.paper"):
        assert contrast(page, selector) >= 4.5, selector
    page.screenshot(path=shots / f"{name}-{scheme}.png")
    page.locator("#figure-table3_smoke_loss").scroll_into_view_if_needed()
    page.screenshot(path=shots / f"{name}-{scheme}-figure.png")
    assert (shots / f"{name}-{scheme}.png").stat().st_size > 10_000


def contrast(page, selector):
    """WCAG contrast of the first element's text with the ground it stands on."""
    return page.evaluate("""(selector) => {
        const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        let element = document.querySelector(`main ${selector}`) ?? document.querySelector(selector);
        const ink = light(parse(getComputedStyle(element).color));
        const behind = (of) => parse(getComputedStyle(of).backgroundColor);
        while (element.parentElement && (behind(element)[3] ?? 1) === 0) element = element.parentElement;
        const ground = light(behind(element));
        return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    }""", selector)


def test_filters_narrow_tables_rows_and_columns_and_stay_in_the_link(visit):
    page = visit()
    total = page.locator("article[data-page]").count()
    assert page.locator("#count").inner_text() == f"{total} of {total} tables"
    page.select_option("select[name=arm]", "calibrated")
    rows = page.locator("#table3 tbody tr[data-method]:visible")
    assert rows.count() and set(rows.evaluate_all("rows => rows.map((row) => row.dataset.arm)")) == {"calibrated"}
    heads = page.locator("#table3 thead th[data-arm]:visible").all_inner_texts()
    assert heads and set(heads) == {"OPUS (calibrated)"}
    assert page.locator("#muon_map").is_hidden()
    page.select_option("select[name=optimizer]", "muon")
    assert page.locator("#table3 [data-optimizer=adamw]:visible").count() == 0
    assert page.locator("#runs tr[data-optimizer=adamw]:not(.off)").count() == 0
    page.select_option("select[name=table]", "table3")
    assert page.locator("#count").inner_text() == f"1 of {total} tables"
    assert page.url.endswith("?table=table3&optimizer=muon&arm=calibrated")
    page.select_option("select[name=table]", "muon_map")
    assert page.locator("#nothing").is_visible() and page.locator("#count").inner_text().startswith("0 of")
    page.click("#show-all")
    assert page.locator("#count").inner_text() == f"{total} of {total} tables" and page.locator(".off").count() == 0
    page.select_option("select[name=method]", "PPL (low)")
    assert page.locator("#table3 tbody tr[data-method]:visible th").first.inner_text() == "PPL (low)"
    page.click("#reset")
    assert page.locator("#count").inner_text() == f"{total} of {total} tables"


def test_a_link_brings_its_table_its_filters_or_its_run(visit):
    page = visit(hash="#table7?optimizer=muon")
    assert page.locator("select[name=optimizer]").input_value() == "muon"
    assert abs(page.locator("#table7").bounding_box()["y"]) < 200
    run = page.locator("#runs tr[data-run]").first.get_attribute("data-run")
    other = visit(hash=f"#run-{run}")
    assert other.locator("dialog[open] h2").inner_text() == f"Run {run}"
    other.keyboard.press("Escape")
    assert other.locator("dialog[open]").count() == 0 and other.url.endswith("#runs")


def test_a_cell_opens_its_records_by_mouse_and_by_keyboard(visit):
    page = visit(hash="#table3")
    row = page.locator("#table3 tbody tr[data-method='OPUS (calibrated)']").first
    row.locator("td").nth(1).click()
    assert page.locator("dialog[open] .run-card").count() == 5  # seeds of the first scale, cpu
    page.locator(".run-card summary").first.click()
    card = page.locator(".run-card").first
    shown = card.inner_text()
    again = "python -m reproduce.table3 --scale cpu --optimizers adamw --seeds 1 --methods 'OPUS (calibrated)'"
    for words in ("Replay", "Config", "Data hashes", "Code version", "Environment", "Deviations", "spec_sha256", again):
        assert words in shown, words
    card.locator("summary", has_text="JSON").click()
    assert f'"run_id": "{card.get_attribute("data-run")}"' in card.inner_text()
    with page.expect_download() as saved:
        card.get_by_text("Download what is shown here").click()
    assert saved.value.suggested_filename == f"{card.get_attribute('data-run')}.json"
    page.keyboard.press("Escape")
    page.locator("#table3 [tabindex='0'][data-runs], #table3 tr[data-runs] [tabindex='0']").first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    title = page.locator("#dialog-title").inner_text()
    assert title.startswith("OPUS (paper): difference to Random")
    assert page.locator("dialog[open] .run-card").count() == 10  # five seeds of each
    page.locator("#close").press("Enter")
    assert page.locator("dialog[open]").count() == 0
    assert page.evaluate("document.activeElement.closest('table') !== null")  # the focus is back where it was


def test_all_that_can_be_done_can_be_reached_by_tab(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("""() => { const e = document.activeElement;
            return e.name || e.getAttribute("role") || e.closest("table")?.getAttribute("role") || e.tagName; }"""))
    assert {"table", "scale", "optimizer", "method", "arm", "region", "grid", "application", "A"} <= seen


def test_a_figure_tells_its_values_to_mouse_and_keyboard(visit):
    page = visit(hash="#figure-table3_smoke_loss")
    svg = page.locator("#figure-table3_smoke_loss svg")
    box, panels = svg.bounding_box(), page.evaluate("data.figures['table3_smoke_loss']")
    across, down, x, y = panels[0]["series"][7]["points"][-1]
    width, height = map(float, svg.get_attribute("viewBox").split()[2:])
    page.mouse.move(box["x"] + across / width * box["width"], box["y"] + down / height * box["height"])
    tip = page.locator("#tip").inner_text()
    assert "OPUS (calibrated)" in tip and "update tokens: 430,080" in tip and f"{y}" in tip
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()
    svg.focus()
    page.keyboard.press("ArrowRight")
    assert "Random" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_without_scripts_and_on_paper_everything_is_there(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("noscript p").is_visible() and page.locator("#filters").is_hidden()
    assert page.locator("#table3 table").first.is_visible() and page.locator("#table3 svg").first.is_visible()
    printed = visit()
    printed.emulate_media(media="print")
    printed.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert printed.locator("#filters").is_hidden() and printed.locator(".side").is_hidden()
    assert printed.locator("main details:not([open])").count() == 0
    overflow = printed.locator(".scroll").evaluate_all("all => all.map((e) => getComputedStyle(e).overflow)")
    assert set(overflow) == {"visible"}


def test_a_hostile_record_does_not_execute(visit, tmp_path):
    folder = written(tmp_path, grid((0,), methods=("Random",)))
    bad = record_of(HOSTILE, 0)
    bad["deviations"] = bad["selection"]["notes"] = [f"</script>{HOSTILE}"]
    results.write(bad, folder / "runs")
    report.report(folder, REPORTED)
    page = visit(site.write(folder, REPORTED), hash=f"#run-{bad['run_id']}")
    assert HOSTILE in page.locator("dialog[open]").inner_text()
    assert page.title() == "opus_bench: results beside arXiv:2602.05400"
