"""The page of `flashmoe sim --html` in headless Chromium: no errors, the values of the table, lanes as the timeline."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from browser import NAMES, Browser, find
from policy_worlds import odd_worlds, small_world

import sim
from flashmoe_numba import cli
from sim.reading.page.gather import gather
from sim.reading.page.write import join
from sim.reading.page.write import page as written

pytestmark = pytest.mark.skipif(find() is None, reason=f"needs a Chromium in PATH, one of {', '.join(NAMES)}")

POLICIES = ("flashmoe", "bulk", "sonic")
FLAGS = ["sim", "--preset", "laptop-text", "--hardware", "4xH100", "--tokens", "512,64", "--policy", ",".join(POLICIES)]
TEXTS = "(selector) => [...document.querySelectorAll(selector)].map((element) => element.textContent)"
# elements that have more text than they show, or lie beyond the box they belong to
CUT = """[...document.querySelectorAll("h1, h2, p, td, th, dt, dd, .names *, svg text")].filter((one) => {
  const box = one.getBoundingClientRect(), around = one.closest("svg, .names") ?? one.parentElement;
  const room = around.getBoundingClientRect(), hidden = !one.closest("svg") && one.scrollWidth > one.clientWidth + 1;
  return box.left < room.left - 1 || box.right > room.right + 1 || (hidden && one.clientWidth);
}).map((one) => one.textContent)"""
# the share of a band's pixels, over all of its simulation, that have not the colour of what is empty
FILLED = """(at) => {
  const lane = lanes[at], band = lane.bands.find((one) => one.name === "SM slots"), pen = lane.canvas.getContext("2d");
  const [r, g, b] = [1, 3, 5].map((from) => parseInt(colour("--empty").slice(from, from + 2), 16));
  Object.assign(view, { from: 0, to: lane.one.horizon_ns });
  draw();
  const pixels = pen.getImageData(0, band.top, lane.canvas.width, band.height).data;
  let filled = 0;
  for (let i = 0; i < pixels.length; i += 4) filled += pixels[i] !== r || pixels[i + 1] !== g || pixels[i + 2] !== b;
  return filled / (pixels.length / 4);
}"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows that `--json` writes, with the page beside them."""
    folder = tmp_path_factory.mktemp("page")
    assert cli.main([*FLAGS, "--html", str(folder / "a.html"), "--json", str(folder / "a.json")]) == 0
    return folder, json.loads((folder / "a.json").read_text())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def page(browser, rows):
    """The page, opened anew in light; no message in the console at the end, and nothing loaded but the file."""
    browser.errors.clear()
    browser.requests.clear()
    browser.dark(False)
    browser.open(rows[0] / "a.html")
    browser.frame()
    yield browser
    assert browser.errors == []
    assert [url for url in browser.requests if not url.endswith("a.html")] == []


def texts(page, selector):
    return page.run(f"({TEXTS})({json.dumps(selector)})")


def test_the_table_is_that_of_the_rows(page, rows):
    head = [re.sub(r"\s+", " ", text) for text in texts(page, "#table th button, #table th:first-child")]
    cells = texts(page, "#table tbody td")
    table = [cells[at : at + len(head)] for at in range(0, len(cells), len(head))]
    assert head[:6] == ["policy", "tokens", "latency", "error", "over", "tokens"]
    assert len(table) == len(rows[1]) == 6
    assert {row["tie"] for row in rows[1]} & {True, None}, "or there is nothing to say"
    for shown, row in zip(table, rows[1], strict=True):
        idle = [f"{100 * row['idle'][cause]:.1f}" for cause in ("launch", "barrier", "waiting", "dependency", "tail")]
        assert shown == [
            row["policy"],
            f"{row['tokens']:,}",
            f"{row['latency_us']:,.1f}",
            "no measurement" if row["left_out_error"] is None else f"± {100 * row['left_out_error']:.1f} %",
            f"{row['over_fastest']:.2f}x{ {True: ' tie', None: ' ?', False: ''}[row['tie']] }",
            f"{row['tokens_per_s'] / 1e6:,.2f}",
            *(f"{100 * row[name]:.1f}" for name in ("tensor_busy", "useful")),
            f"{row['host_us']:,.1f}",
            f"{row['rank_imbalance']:,.2f}",
            f"{row['expert_imbalance']:,.2f}",
            f"{row['nvlink_bytes_max'] / 1e6:,.1f}",
            f"{row['rate']:.3f}{'' if row['rate_fitted'] else '*'}",
            f"{100 * row['resident']:.1f}",
            *idle,
            f"{row['exposed_communication_us']:,.1f}",
        ]


def test_columns_sort(page, rows):
    page.run("document.querySelectorAll('#table th button')[1].click()")
    latency = [float(text.replace(",", "")) for text in texts(page, "#table tbody td:nth-child(3)")]
    assert latency == sorted(latency)
    assert page.run("document.querySelector('#table th[aria-sort=ascending]').textContent").startswith("latency")
    page.run("document.querySelectorAll('#table th button')[1].click()")
    assert texts(page, "#table tbody td:nth-child(3)") == [f"{value:,.1f}" for value in reversed(latency)]


def test_lanes_are_as_full_as_the_report_says(page, rows):
    first = [row for row in rows[1] if row["tokens"] == 512]
    assert [text.split()[0] for text in texts(page, ".lane.first strong")] == list(POLICIES)
    for at, row in enumerate(first):
        assert page.run(f"({FILLED})({at})") == pytest.approx(row["resident"], abs=0.03), row["policy"]


def test_bars_are_the_shares_and_times_of_the_rows(page, rows):
    first = [row for row in rows[1] if row["tokens"] == 512]
    bars = page.run(
        "[...document.querySelectorAll('#idle .bar')].map((bar) => Object.fromEntries("
        "[...bar.children].map((part) => [part.dataset.part, part.getBoundingClientRect().width"
        " / bar.getBoundingClientRect().width])))"
    )
    for bar, row in zip(bars, first, strict=True):
        expected = {"resident": row["resident"], **row["idle"]}
        assert bar == {name: pytest.approx(share, abs=0.002) for name, share in expected.items() if share}
    ends = texts(page, "#path .soft")
    assert ends == [f"{row['latency_us']:,.1f} us" for row in first]


def test_the_other_tokens_are_shown_when_chosen(page, rows):
    assert texts(page, "#group option") == ["512 tokens per rank", "64 tokens per rank"]
    page.run("(() => { $('group').selectedIndex = 1; $('group').dispatchEvent(new Event('change')); })()")
    second = [row for row in rows[1] if row["tokens"] == 64]
    assert texts(page, "#path .soft") == [f"{row['latency_us']:,.1f} us" for row in second]
    assert texts(page, "#floors tbody td:nth-last-child(2)") == [f"{row['latency_us']:,.1f}" for row in second]


def test_keys_zoom_pan_and_read(page, rows):
    longest = max(row["latency_us"] for row in rows[1] if row["tokens"] == 512)
    page.run("$('lanes').focus()")
    assert page.run("$('reading').textContent") == ""
    page.key("+")
    span = page.run("[view.from, view.to]")
    assert span == [pytest.approx(longest * 250), pytest.approx(longest * 750)]
    page.key("ArrowRight", modifiers=8)
    assert page.run("view.from") == pytest.approx(longest * 350)
    page.key("ArrowDown")
    page.key("ArrowLeft")
    assert texts(page, ".lane.chosen strong")[0].startswith("bulk")
    said = page.run("$('reading').textContent")
    assert said.startswith(f"{(0.6 - 0.005) * longest:,.1f} us, bulk, mean of 4 ranks · host: ")
    cursor = "$('cursor').getBoundingClientRect().left - lanes[0].canvas.getBoundingClientRect().left"
    width = page.run("lanes[0].canvas.clientWidth")
    assert page.run(cursor) == pytest.approx((0.595 - 0.35) / 0.5 * width, abs=1)
    page.key("0")
    assert page.run("[view.from, view.to]") == [0, pytest.approx(longest * 1000)]


def test_the_reading_is_what_runs_at_the_cursor(page, rows):
    """Of the lane's series, step by step, by another way than the page's."""
    value = json.loads(page.run("document.getElementById('data').textContent"))
    one = value["simulations"][0]
    (band,) = [band for band in one["lanes"][0]["bands"] if band["name"] == "SM slots"]
    for share in (0.2, 0.5, 0.8):
        at = one["horizon_ns"] * share
        page.run(f"(() => {{ view.cursor = {at}; view.chosen = 0; draw(); }})()")
        said = page.run("$('reading').textContent").split("SM slots: ")[1].split(" · ")[0]
        now = {}
        for kind, part in band["parts"].items():
            time = 0
            for step, level in zip(part["at"], part["level"], strict=True):
                time += step
                if time <= at:
                    now[kind.lower()] = level
        held = {kind: level for kind, level in now.items() if level}
        found = {kind: float(text) for kind, text in re.findall(r"(\w+) ([\d.]+)", said.split(" of ")[0])}
        assert found == {kind: pytest.approx(level, abs=0.051) for kind, level in held.items()}


def test_means_of_any_time_are_those_of_the_steps(page):
    value = json.loads(page.run("document.getElementById('data').textContent"))
    shares = (0.1, 0.33, 0.7, 1)
    for at, one in enumerate(value["simulations"][: len(POLICIES)]):
        horizon = one["horizon_ns"]
        for number, band in enumerate(one["lanes"][0]["bands"]):
            for part, (name, series) in enumerate(band["parts"].items()):
                times = f"{json.dumps(shares)}.map((share) => share * {horizon})"
                found = page.run(f"{times}.map((time) => upTo(lanes[{at}].bands[{number}].parts[{part}].series, time))")
                starts = np.cumsum(series["at"])
                ends = np.append(starts[1:], horizon)
                inside = [np.clip(share * horizon, starts, ends) - starts for share in shares]
                assert found == pytest.approx([float((level * series["level"]).sum()) for level in inside]), name


def test_the_wheel_zooms_about_the_pointer_and_a_drag_pans(page):
    box = page.run("(() => { const b = lanes[0].canvas.getBoundingClientRect(); return [b.left, b.top, b.width]; })()")
    page.run(f"scrollTo(0, {box[1] - 200})")
    top = page.run("lanes[0].canvas.getBoundingClientRect().top") + 40
    x, whole = box[0] + box[2] / 4, page.run("view.all")
    page.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=top, deltaX=0, deltaY=-400, modifiers=2)
    page.frame()
    low, high = page.run("[view.from, view.to]")
    assert high - low < 0.6 * whole
    pixel = whole / box[2]  # a pointer is at whole ones
    assert low + (high - low) / 4 == pytest.approx(whole / 4, abs=pixel)
    mouse = dict(button="left", clickCount=1)
    page.send("Input.dispatchMouseEvent", type="mousePressed", x=x, y=top, **mouse)
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x - box[2] / 10, y=top, button="left")
    page.send("Input.dispatchMouseEvent", type="mouseReleased", x=x - box[2] / 10, y=top, **mouse)
    page.frame()
    assert page.run("view.from") == pytest.approx(low + (high - low) / 10, abs=pixel)


def test_ranks_open_and_close(page):
    assert page.run("lanes.length") == 3
    page.run("document.querySelector('.lane.first button').click()")
    assert texts(page, ".lane:not(.first) strong") == [f"rank {rank}" for rank in range(4)]
    assert page.run("document.querySelector('.lane.first button').getAttribute('aria-expanded')") == "true"
    page.run("document.querySelector('.lane.first button').click()")
    assert page.run("lanes.length") == 3


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_cut_and_all_can_be_read(page, width, dark):
    page.dark(dark)
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.frame()
    page.run("document.querySelectorAll('.lane.first button').forEach((button) => button.click())")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(CUT) == []
    ink, back = page.run("[colour('--text'), getComputedStyle(document.body).backgroundColor]")
    assert (ink, back) == (("#e8eaee", "rgb(20, 22, 26)") if dark else ("#16181d", "rgb(255, 255, 255)"))


@pytest.mark.parametrize("name", ["nothing at all", "one rank", "one token", "too many simulations"])
def test_odd_simulations_have_a_page(browser, tmp_path, name):
    many = name.startswith("too")
    world = odd_worlds().get(name) or small_world()
    simulations = [sim.simulate(policy, world) for policy in POLICIES]
    rows = [asdict(sim.report(one)) for one in simulations]
    join(rows, [gather(one, 10**6 if many else 1) for one in simulations], tmp_path / "a.html")
    browser.errors.clear()
    browser.open(tmp_path / "a.html")
    assert texts(browser, "#path .soft") == [f"{row['latency_us']:,.1f} us" for row in rows]
    assert browser.run("lanes.length") == (0 if many else 3)
    browser.run("$('lanes').focus()")
    for key in ("+", "ArrowRight", "ArrowDown", "-", "0"):
        browser.key(key)
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=600, y=500)
    browser.run("document.querySelectorAll('button').forEach((button) => button.click())")
    assert browser.errors == []
    for notes, said in zip(
        [one["notes"] for one in map(gather, simulations)], texts(browser, "#about dd")[-3:], strict=True
    ):
        assert all(note in said for note in notes)
        assert ("no timeline" in said) == many


@pytest.mark.parametrize(("error", "text"), [(0.118, "± 11.8 %"), (None, "no measurement"), ("poor", "poor")])
def test_the_error_of_a_row_has_a_column(browser, rows, tmp_path, error, text):
    source = (rows[0] / "a.html").read_text()
    value = json.loads(re.search(r'id="data">(.*?)</script>', source, re.DOTALL)[1])
    value["simulations"][0]["row"]["left_out_error"] = error
    (tmp_path / "b.html").write_text(written(value))
    browser.open(tmp_path / "b.html")
    assert texts(browser, "#table th:nth-child(4) button") == ["error"]
    assert texts(browser, "#table tbody td:nth-child(4)")[0] == text
    for simulation in value["simulations"]:
        simulation["row"]["knobs"]["rate"] = 0.6
    (tmp_path / "b.html").write_text(written(value))
    browser.open(tmp_path / "b.html")
    assert "error" not in texts(browser, "#table th button")
