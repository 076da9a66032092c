"""`smolds report --html`: the page has the run's content, and a browser shows it without a network."""

import json
import re
import shutil

import pytest
from ranks import smolds
from test_tensorboard import CHROMIUM, SCREENSHOTS

from smolds_dist.errors import ConfigError
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
        expect(page.locator(".curves .js-plotly-plot")).to_have_count(len(CURVES.keys() - {"mtp_loss"}))
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


EXPERT = {
    "load": 0.5, "weight": 0.25, "sources": {"code": 0.75, HOSTILE: 0.25}, "kinds": {"word": {"share": 1, "lift": 1.0}},
    "tokens": [{"text": HOSTILE, "count": 30, "lift": 1.5, "lift_at_least": 1.2}], "shared_tokens": [[1, 0.5]],
    "same_token_types": [], "similar_weights": [[1, 0.125]], "ablation": 0.02, "ablation_sources": {"code": 0.03},
}  # fmt: skip
BITS = dict.fromkeys(("source_bits", "context_bits", "kind_bits"), 0.4)
BITS |= {f"{name}_shuffled": 0.01 for name in BITS}
EXPERTS = {
    "sources": {"code": {"tokens": 10, "loss": 2.0}, HOSTILE: {"tokens": 10, "loss": 3.0}}, "source_entropy_bits": 1.0,
    "kinds": {"word": 20}, "layers": [
        {"layer": layer, "max_vio": 0.5, **BITS, "experts": [EXPERT, {**EXPERT, "load": 0.125, "weight": None}]}
        for layer in (1, 2)
    ],
}  # fmt: skip


def test_page_has_the_map_of_experts_as_a_table_of_escaped_text(copied):
    assert "class=map" not in html_page([copied])
    (copied / "experts.json").write_text(json.dumps(EXPERTS))
    page = html_page([copied])
    assert HOSTILE not in page and "&quot;&lt;script&gt;document.title" in page
    assert re.findall(r"<th scope=row>(layer \d)</th>", page) == ["layer 1", "layer 2"]
    cells = re.findall(r'<td style="([^"]*)"><a href="#experts0-2-(\d)">(.*?)</a></td>', page)
    assert [expert for _, expert, _ in cells] == ["0", "1"]
    assert re.findall(r">([^<]+)</span>", cells[0][2]) == ["1.00", "1.50", "0.50", "1.00", "0.25", "+0.020"]
    assert re.findall(r">([^<]+)</span>", cells[1][2])[:2] == ["0.25", "6.00"] and cells[1][2].count(">-<") == 1
    assert cells[0][0].startswith("--c0:#ffffff;--c1:#f3") and cells[1][0].startswith("--c0:#4393c3;--c1:#d6604d")
    assert page.count('<section class=expert id="experts0-') == 4
    both = html_page([copied, copied])
    assert both.count('id="experts0-1-1"') == 1
    layer = EXPERTS["layers"][0]
    (copied / "experts.json").write_text(json.dumps(EXPERTS | {"layers": [layer | {"experts": [EXPERT]}, layer]}))
    assert html_page([copied]).count("Layer 1, expert") == 3
    (copied / "experts.json").write_text(json.dumps(EXPERTS | {"layers": []}))
    with pytest.raises(ConfigError, match=r"experts.json is invalid \(layers: .* write it again with"):
        html_page([copied])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: .ci/install_system_packages.sh installs it")
@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no_scripts"])
def test_browser_colors_the_map_and_opens_an_expert_by_keyboard(copied, scripts):
    from playwright.sync_api import expect, sync_playwright

    (copied / "experts.json").write_text(json.dumps(EXPERTS))
    (copied / "report.html").write_text(html_page([copied]))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(java_script_enabled=scripts, viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        page.goto((copied / "report.html").as_uri())
        cell = page.locator(".map tbody td").nth(1)
        expect(cell).to_have_css("background-color", "rgb(67, 147, 195)")
        expect(cell.locator("span:visible")).to_have_text(["0.25"])
        page.get_by_label("share of code, relative to load").check()
        expect(cell).to_have_css("background-color", "rgb(214, 96, 77)")
        expect(cell.locator("span:visible")).to_have_text(["6.00"])
        expect(page.locator(".expert:visible")).to_have_count(0)
        page.locator(".map tbody a").nth(3).focus()
        page.keyboard.press("Enter")
        expect(page.locator(".expert:visible h3")).to_have_text(["Layer 2, expert 1"])
        expect(page.locator(".expert:visible")).to_contain_text(HOSTILE)
        page.locator(".expert:visible").get_by_role("link", name="1", exact=True).first.click()
        expect(page.locator(".expert:visible h3")).to_have_text(["Layer 2, expert 1"])
        page.locator(".map tbody a").first.click()
        expect(page.locator(".expert:visible h3")).to_have_text(["Layer 1, expert 0"])
        assert page.title() == "one"
        browser.close()
