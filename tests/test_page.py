"""`smolds report --html`: the page has the run's content, and a browser shows it without a network."""

import json
import re
import shutil

import pytest
from ranks import smolds
from test_tensorboard import CHROMIUM, SCREENSHOTS

from smolds_dist.observe.curves import CURVES
from smolds_dist.observe.page import FRAMES, POINTS, draw_curve, draw_loads, html_page
from smolds_dist.observe.rows import read_rows

HOSTILE = "<script>document.title = 'taken'</script><b>bold</b>"


@pytest.fixture
def copied(kept_run, tmp_path):
    """Return a run's folder that may be changed."""
    shutil.copytree(kept_run[0], tmp_path / "one", symlinks=True)
    return tmp_path / "one"


def test_page_holds_facts_samples_settings_events_and_environment(copied, tmp_path):
    with (copied / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "prompt": "", "text": HOSTILE}) + "\n")
    finished = smolds("report", str(copied), "--html")
    assert finished.returncode == 0, finished.text
    assert finished.stdout.splitlines()[-1] == str(copied / "report.html")
    page = (copied / "report.html").read_text()
    assert HOSTILE not in page and "&lt;script&gt;document.title" in page
    assert "<td>parameters</td><td>65,568</td>" in page and "num_experts: 8" in page
    assert "after step 0: started on" in page and "<td>host</td>" in page
    assert page.count("plotly.js v") <= 2 and page.count("Plotly.newPlot(") >= 8


def test_curves_are_thinned_out_and_the_slider_has_a_bounded_number_of_steps(tmp_path):
    rows = [{"step": n, "loss": 1.0, "load": [[0.25, 0.75]] * 3} for n in range(1, 3 * POINTS)]
    curve = draw_curve({tmp_path: rows}, "loss")
    assert all(POINTS / 2 <= len(line.x) <= POINTS for line in curve.data)
    loads = draw_loads(rows)
    names = [frame.name for frame in loads.frames]
    assert len(names) == FRAMES and names[0] == "1" and names[-1] == str(rows[-1]["step"])
    assert [list(layer) for layer in loads.data[0].z] == [[0.5, 1.5]] * 3
    assert [step.label for step in loads.layout.sliders[0].steps] == names
    assert len(draw_loads(rows[:5]).frames) == 5
    assert draw_loads([{"step": 1, "loss": 2.0}]) is None and draw_curve({tmp_path: rows}, "lr") is None


def test_several_runs_share_the_curves_and_differ_in_settings(copied, tmp_path):
    other = tmp_path / "<i>two"
    shutil.copytree(copied, other, symlinks=True)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"  lr: .*", "  lr: 0.123", config))
    page = html_page([copied, other])
    assert "<i>two" not in page and "&lt;i&gt;two" in page
    assert re.search(r"<tr><td>train.lr</td><td>[\d.e-]+</td><td>0.123</td></tr>", page)
    assert page.count("<h2>Load of every expert of ") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: .ci/install_system_packages.sh installs it")
def test_browser_draws_the_curves_and_moves_the_slider(copied):
    from playwright.sync_api import expect, sync_playwright

    injected = f"{HOSTILE}<img src=x onerror=\"document.title = 'taken'\"></body>"
    (copied / "report.html").write_text(html_page([copied]).replace("</body>", injected))
    steps = [row["step"] for row in read_rows(copied / "metrics.jsonl") if "load" in row]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        asked, complaints = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((copied / "report.html").as_uri())
        expect(page.locator(".curves .js-plotly-plot")).to_have_count(len(CURVES))
        widths = page.locator(".curves .js-plotly-plot .main-svg:first-child").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect().width)"
        )
        assert max(widths) < 640  # two side by side
        loads = page.locator(".js-plotly-plot").last
        expect(loads.locator(".slider-label").first).to_have_text(f"step {steps[-1]}")
        before = loads.evaluate("one => JSON.stringify(one.data[0].z)")
        loads.locator(".slider-rail-touch-rect").scroll_into_view_if_needed()
        box = loads.locator(".slider-rail-touch-rect").bounding_box()
        page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
        expect(loads.locator(".slider-label").first).to_have_text(f"step {steps[0]}")
        drawn = "JSON.stringify([...document.querySelectorAll('.js-plotly-plot')].pop().data[0].z)"
        page.wait_for_function(f"before => {drawn} != before", arg=before)
        assert page.title() == "one"  # scripts in text do not run
        SCREENSHOTS.mkdir(exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "page.png")
        browser.close()
    assert not complaints
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
