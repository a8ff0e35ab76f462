"""The console's live view: its figures and charts."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from playwright.sync_api import expect

from support.browser import Tab
from support.console_api import stats
from support.live_server import wait_until

pytestmark = pytest.mark.slow


def test_live_figures_are_differences_of_counters(tab: Tab) -> None:
    rounds = iter(range(1000))
    tab.page.route(re.compile(r"/v1/stats$"), lambda route: route.fulfill(json=stats(next(rounds))))
    tab.page.clock.install()
    page = tab.open("live")
    expect(page.get_by_role("region", name="Memory")).to_contain_text("4.0 KiB of 8.0 KiB")
    for _ in range(3):
        with page.expect_response(re.compile("/v1/stats$")):
            page.clock.run_for(2100)
    expect(page.get_by_role("region", name="Throughput")).to_contain_text("new tokens/s 50")
    expect(page.get_by_role("region", name="Waiting time")).to_contain_text("to the first token 100 ms")
    expect(page.get_by_role("region", name="Where adapters were found")).to_contain_text("device 75%")
    expect(page.get_by_role("region", name="Tenants")).to_contain_text("acme0.550")
    expect(page.get_by_role("region", name="Adapters", exact=True)).to_contain_text("acme/support")
    tab.check()


def test_charts_beside_each_other_begin_at_one_height(tab: Tab) -> None:
    tab.page.route(re.compile(r"/v1/stats$"), lambda route: route.fulfill(json=stats(0)))
    tab.page.set_viewport_size({"width": 1280, "height": 800})
    page = tab.open("live")
    places = [page.get_by_role("region", name=name) for name in ("Throughput", "Waiting time")]
    # As with a wide font, in which the legend has two lines.
    places[0].locator(".legend").evaluate("(legend) => { legend.style.height = '60px'; }")
    for part in (".legend", ".plot"):
        boxes = [place.locator(part).bounding_box() for place in places]
        assert boxes[0] and boxes[1] and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    tab.check()


def test_live_of_an_idle_server_has_different_numbers_beside_an_axis(tab: Tab) -> None:
    tab.page.add_init_script("""window.drawn = [];
        const fill = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
            window.drawn.push(text);
            return fill.call(this, text, ...rest);
        };""")
    rounds = iter(range(1000))
    idle = {"running": 0, "waiting": 0, "tokens": {"prompt": 0, "completion": 0}}
    tab.page.route(re.compile(r"/v1/stats$"), lambda route: route.fulfill(json=stats(next(rounds)) | idle))
    tab.page.clock.install()
    page = tab.open("live")
    for _ in range(3):
        with page.expect_response(re.compile("/v1/stats$")):
            page.clock.run_for(2100)

    def numbers_drawn() -> list[str]:
        # A chart is drawn in a frame after its figures have come.
        page.clock.run_for(50)
        return [text for text in page.evaluate("window.drawn") if re.fullmatch(r"[\d.]+", text)]

    wait_until(lambda: numbers_drawn().count("1") > 1)
    numbers = numbers_drawn()
    assert all(first != second for first, second in pairwise(numbers))
    # A short name is not broken beside a bar.
    name = page.get_by_role("region", name="Tenants").get_by_role("rowheader").first
    assert (
        name.evaluate(
            "(cell) => { const range = new Range(); range.selectNodeContents(cell);"
            " return range.getClientRects().length; }"
        )
        == 1
    )
    tab.check()
