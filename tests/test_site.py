"""The built site in a real browser: what a reader sees at a desk and on a phone, by day and by night, and with the keyboard."""

import functools
import http.server
import threading
from importlib.resources import files

import pytest

from m2helpers.data import load_dataset
from m2helpers.forecasting import generate
from m2helpers.ledger import Ledger
from m2helpers.report import live
from tests.browser import WIDTHS, built_site, chromium

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]
LOOKS = [("desktop", "light"), ("phone", "dark"), ("desktop", "dark"), ("phone", "light")]
AUDITED = (
    "index.html",
    "live.html",
    "experiments.html",
    "own-data.html",
    "notebooks/4_train_lora_llm.html",
    "search.html",
)
DONE = "() => document.getElementById('live-status').textContent.startsWith('Done')"
LAYOUT = """() => {
  const shown = (box) => box.getClientRects().length > 0;
  const boxes = (selector) => [...document.querySelectorAll(selector)].filter(shown);
  const sticksOut = (formula) => [...formula.querySelectorAll("math *")].some((part) => {
    const box = part.getBoundingClientRect(), frame = formula.getBoundingClientRect();
    return box.height > 0 && (box.top < frame.top - 1 || box.bottom > frame.bottom + 1);
  });
  return {
    sideways: document.scrollingElement.scrollWidth > innerWidth,
    clipped: boxes(".formula").filter(sticksOut).length,
    code: boxes(".input_area pre").filter((pre) => pre.scrollWidth > pre.clientWidth + 1 && !/.{121}/.test(pre.textContent)).length,
    unreachable: boxes("article pre, article .formula, article .output_area, article .table-wrapper")
      .filter((box) => box.scrollWidth > box.clientWidth && /auto|scroll/.test(getComputedStyle(box).overflowX) && box.tabIndex < 0).length,
    images: boxes("article img:not(.toggler)").filter((image) => !image.complete || !image.naturalWidth || image.alt.length < 25).map((image) => image.src),
    formulas: boxes(".formula").length,
    powers: [...document.querySelectorAll("article td, article p")].filter((cell) => /\\de[+]\\d/.test(cell.textContent)).length,
  };
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser):
    """Opens a page of the site from a file, as one of `LOOKS`, and keeps what it asks for and what goes wrong."""
    contexts = []

    def go(look, path="index.html"):
        (width, height), scheme = WIDTHS[look[0]], look[1]
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        contexts[-1].set_default_timeout(120_000)
        page = contexts[-1].new_page()
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto((built_site() / path).as_uri())
        return page

    yield go
    for context in contexts:
        context.close()


def _pages():
    site = built_site()
    return [str(path.relative_to(site)) for path in sorted([*site.glob("*.html"), *site.glob("notebooks/*.html")])]


@pytest.mark.parametrize("look", LOOKS, ids="-".join)
def test_every_page_reads_well(visit, look):
    page, formulas = visit(look), 0
    for path in _pages():
        page.goto((built_site() / path).as_uri())
        found = page.evaluate(LAYOUT)
        formulas += found.pop("formulas")
        if look[0] == "phone":
            found["code"] = 0  # it scrolls
        assert not any(found.values()), f"{path}: {found}"
        ground, words = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (sum(_rgb(ground)) < sum(_rgb(words))) == (look[1] == "dark"), path
    assert formulas >= 5
    assert page.errors == [] and {url.partition(":")[0] for url in page.asked} <= {"file", "data"}


@pytest.mark.parametrize("look", LOOKS, ids="-".join)
def test_nothing_serious_for_axe(visit, look):
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page, found = visit(look), []
    for path in AUDITED:
        page.goto((built_site() / path).as_uri())
        page.evaluate(axe)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert len(result["passes"]) > 10  # it looked
        for rule in result["violations"]:
            if rule["impact"] in ("serious", "critical"):
                found.append((path, rule["id"], rule["nodes"][0]["html"][:200]))
    assert found == []


def test_a_notebook_shows_its_argument_and_folds_the_rest(visit):
    page = visit(LOOKS[0], "notebooks/5_initial_train_behaviour.html")
    conclusion = page.locator("section", has=page.locator("h2", has_text="What we saw")).last
    assert conclusion.locator("pre").count() == 0 and len(conclusion.inner_text()) > 300
    folded = page.locator("details.fold")
    assert folded.count() > 5 and not page.locator("details.fold .input_area pre").first.is_visible()
    page.locator("details.fold > summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.fold .input_area pre").first.is_visible()
    alts = page.eval_on_selector_all("article img", "images => images.map(image => image.alt)")
    assert len(alts) > 5 and len(set(alts)) > len(alts) / 2
    heads = page.eval_on_selector_all(
        "table.dataframe tbody tr:first-child > :first-child", "cells => cells.map(c => c.textContent.trim())"
    )
    assert heads and "0" not in heads  # no counting of rows


def test_search_shows_excerpts_from_a_server(browser):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(built_site()))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/search.html?q=parroting")
        page.wait_for_selector("#search-results li p.context", timeout=60_000)
        excerpts = page.eval_on_selector_all("#search-results li p.context", "found => found.map(p => p.textContent)")
        page.close()
        server.shutdown()
    assert any("parroting" in excerpt.lower() for excerpt in excerpts)


def test_the_live_page_forecasts_what_the_package_does(visit, tmp_path):
    """On a phone, from a file: the forecast, its FLOPs, and the context moved with the keyboard."""
    page = visit(LOOKS[1], "live.html")
    page.select_option("#live-paths", "0")
    page.wait_for_function(DONE)
    seen = int(page.inner_text("#live-seen-value"))
    page.focus("#live-seen")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.getElementById('live-seen-value').textContent == {seen + 1}")
    page.wait_for_function("!document.getElementById('live-status').textContent.startsWith('Done')")
    page.wait_for_function(DONE)
    end, series = int(page.inner_text("#live-end-value")), load_dataset().part("test")[0]
    run = live.live_run()
    context = "".join(f"{step};" for step in run.codec.encode(series).split(";")[end - seen - 1 : end])
    (ours,) = generate(
        run.base, run.codec, [context], 10, 2, constrained=True, ledger=Ledger(tmp_path / "ledger.sqlite")
    )
    written = page.eval_on_selector_all(
        "#live-tokens .new, #live-tokens .forced", "parts => parts.map(p => p.textContent).join('')"
    )
    assert written == ours.text
    assert int(page.get_attribute("#live-flops tr:last-child td[data-exact]", "data-exact")) == ours.flops
    assert page.locator("#live-table tr").count() == 10 and page.locator("#live-chart circle").count() == 20
    assert page.errors == [] and {url.partition(":")[0] for url in page.asked} == {"file"}


def test_the_live_page_takes_a_series_of_ones_own(visit):
    page = visit(LOOKS[0], "live.html")
    page.select_option("#live-series", "own")
    page.select_option("#live-paths", "10")
    before = page.input_value("#live-numbers")
    box = page.locator("#live-chart").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 200, steps=5)
    page.mouse.up()
    drawn = page.input_value("#live-numbers")
    changed = [a != b for a, b in zip(before.splitlines(), drawn.splitlines(), strict=True)]
    assert 20 < sum(changed) < 60  # where the pen went, and nowhere else
    page.click("#live-draw summary")
    page.fill("#live-numbers", "1, 2\n3, x")
    page.click("#live-use")
    assert "Line 2 is not two numbers" in page.inner_text("#live-status")
    page.fill("#live-numbers", "\n".join(f"{1 + i % 4}, {2 - i % 2}" for i in range(24)))
    page.click("#live-use")
    page.wait_for_function("document.querySelectorAll('#live-chart .band').length == 2")
    page.wait_for_function(DONE)
    assert int(page.inner_text("#live-end-value")) == 23


def _rgb(colour):
    return [int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
