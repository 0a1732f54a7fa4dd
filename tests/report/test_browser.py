"""The page in a real browser: no errors, the slider by keyboard, the filter, dark and light, a phone.

Needs Chromium and Playwright; skipped where either is missing, as in CI unless it installs a browser.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import RATIOS, written

playwright = pytest.importorskip("playwright.sync_api")
images = pytest.importorskip("PIL.Image")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GOLDEN = Path(__file__).parent / "golden"
SMALL = (64, 48)
ROUGHLY = 14.0
"""Mean difference of grey values, of 255, up to which a picture looks alike."""

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"), pytest.mark.slow]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("page") / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """One look at the page, with everything that the browser complains of."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int], scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready=yes]", state="attached")

    def pixels(self) -> Any:
        """What is seen at first, in grey and small."""
        return images.open(BytesIO(self.page.screenshot())).convert("L").resize(SMALL)

    def overflow(self) -> int:
        width: int = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return width


def difference(first: Any, second: Any) -> float:
    """Mean of the absolute differences of two grey pictures."""
    one, other = bytes(first.tobytes()), bytes(second.tobytes())
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / (SMALL[0] * SMALL[1])


def test_desktop_by_keyboard(browser: Any, address: str) -> None:
    visit = Visit(browser, address, (1280, 960))
    page = visit.page
    seen = visit.pixels()
    assert difference(seen, images.open(GOLDEN / "desktop.png")) < ROUGHLY
    assert visit.overflow() <= 0
    assert page.locator(".plot svg").count() == 4
    assert page.text_content("#chosen") == "the plan that was given"

    cell = page.locator('.heat a[title="layers.0.ffn:ffn"]')
    before = cell.inner_text()
    page.focus("#ratio")
    for _ in RATIOS:
        page.keyboard.press("ArrowRight")
    assert page.text_content("#chosen").startswith("60 %: ")
    assert int(cell.inner_text()) < int(before)
    assert page.locator("#curves .mark-symbol path").count() >= 12  # dots and the legend
    page.keyboard.press("Home")
    assert page.text_content("#chosen").startswith("0 %: 100.0 % of the parameters left")
    assert cell.inner_text() == "100"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.text_content("#chosen") == "the plan that was given"
    assert cell.inner_text() == before

    page.focus("#search")
    page.keyboard.type("ffn.down")
    assert page.text_content("#count") == "3 of 16"
    page.keyboard.press("Enter")
    assert page.locator("#cards details:visible").count() == 3
    page.select_option("#state", "refused")
    assert page.text_content("#count") == "0 of 16"
    page.select_option("#state", "")
    page.locator("#cards details:visible summary").first.focus()
    page.keyboard.press("Enter")
    card = page.locator("#cards details[open] .body")
    assert "layers.0.ffn.fused.weight" in card.inner_text()
    assert "hidden = silu(gate) * up" in card.inner_text()
    assert visit.complaints == []


def test_a_cell_leads_to_its_card(browser: Any, address: str) -> None:
    visit = Visit(browser, address, (1280, 960))
    visit.page.focus('.heat a[title=":hidden"]')
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#cards details[open] .refusal")
    text = visit.page.locator("#cards details[open] .body").inner_text()
    assert "layer_norm takes statistics over this dim" in text
    assert "by aten.layer_norm.default at layer_norm" in text
    assert visit.complaints == []


def test_a_phone_in_the_dark(browser: Any, address: str) -> None:
    light, dark = (Visit(browser, address, (390, 844), scheme) for scheme in ("light", "dark"))
    assert light.overflow() <= 0
    assert difference(light.pixels(), images.open(GOLDEN / "phone.png")) < ROUGHLY
    mean = [sum(visit.pixels().tobytes()) / (SMALL[0] * SMALL[1]) for visit in (light, dark)]
    assert mean[0] > 200
    assert mean[1] < 80
    assert light.complaints == dark.complaints == []
