"""The page in a real browser: curves, sliders in mid-run, frames as they come, a reload.

Needs chromium (.ci/install-browser). LIGHTFORCING_PICTURES names a folder to keep screenshots in.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--mute-audio", "--disable-background-networking", "--disable-component-update"),
    "--disable-sync",
]
_WAIT_SECONDS = 60
SPARSE, STREAM = "LightForcingSparseAttention", "LightForcingStreamVideo"
BENCHMARK = "LightForcingBenchmark"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no chromium: run .ci/install-browser as root")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=_FLAGS)
        yield chromium
        chromium.close()


class Page:
    """ComfyUI's page with our pack."""

    def __init__(self, server: Any, browser: Any, *, html_nodes: bool, palette: str) -> None:
        self.server = server
        self.complaints: list[str] = []
        for name, value in {
            "Comfy.TutorialCompleted": True,
            "Comfy.Minimap.Visible": False,
            "Comfy.VueNodes.Enabled": html_nodes,
            "Comfy.ColorPalette": palette,
        }.items():
            server.ask(f"/api/settings/{name}", value)
        self.page = browser.new_page(viewport={"width": 1500, "height": 980})
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self._note(f"{error}\n{error.stack or ''}"))
        self.open()

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self._note(f"{message.text} {message.location.get('url', '')}")

    def _note(self, text: str) -> None:
        # Core logs errors of its own; a missing model's address contains no name of our files.
        if "/extensions/comfyui-light-forcing/" in text or "/lightforcing/" in text:
            self.complaints.append(text)

    def open(self) -> None:
        """Load the page, or load it again."""
        self.page.goto(f"http://127.0.0.1:{self.server.port}")
        self.until(f"window.app?.graph && window.LiteGraph?.registered_node_types['{STREAM}']")

    def until(self, condition: str, seconds: float = _WAIT_SECONDS) -> None:
        """Wait for a JavaScript expression to be true."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(f"() => Boolean({condition})"):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}"
            time.sleep(0.05)

    def until_value(self, node: str, widget: str, value: Any) -> None:
        """Wait for a widget to have a value."""
        end = time.monotonic() + 5
        while self.value(node, widget) != value:
            assert time.monotonic() < end, f"{widget} is {self.value(node, widget)}"
            time.sleep(0.05)

    def load(self, name: str, **widgets: Any) -> None:
        """Open a shipped workflow; keywords are values of Stream Video's widgets."""
        graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
        self.page.evaluate("graph => app.loadGraphData(graph)", graph)
        self.until(f"app.graph.nodes.length === {len(graph['nodes'])}")
        for widget, value in widgets.items():
            self.set(STREAM, widget, value)
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        time.sleep(1)  # the view glides there

    def value(self, node: str, widget: str) -> Any:
        return self.page.evaluate(f"(name) => {_WIDGET.format(node)}.value", widget)

    def set(self, node: str, widget: str, value: Any) -> None:
        self.page.evaluate(
            f"([name, value]) => {{ {_WIDGET.format(node)}.value = value }}", [widget, value]
        )

    def drag(self, widget: str, start: float, end: float) -> None:
        """Drag a slider of the Sparse Attention node on the canvas; shares of its width."""
        ends = self.page.evaluate(
            f"""([name, ...shares]) => {{
                const node = app.graph.nodes.find((n) => n.type === "{SPARSE}");
                const widget = node.widgets.find((w) => w.name === name);
                const x = (share) => node.pos[0] + 15 + share * (node.size[0] - 30);
                const y = node.pos[1] + widget.y + 10;
                return shares.map((share) => app.canvasPosToClientPos([x(share), y]));
            }}""",
            [widget, start, end],
        )
        mouse = self.page.mouse
        mouse.move(*ends[0])
        mouse.down()
        mouse.move(*ends[1], steps=8)
        mouse.up()

    def curve(self) -> str:
        return self.page.evaluate("document.querySelector('.lightforcing-growth')?.outerHTML ?? ''")

    def marks(self) -> dict[int, float]:
        """Sparsity that each chunk used, as drawn."""
        found = self.page.evaluate(
            "[...document.querySelectorAll('.lightforcing-mark')]"
            ".map((m) => [Number(m.dataset.chunk), Number(m.dataset.sparsity)])"
        )
        return dict(found)

    def status(self) -> str:
        return self.page.evaluate("document.querySelector('.lightforcing-status')?.textContent")

    def picture(self) -> str:
        """What the player shows now."""
        return self.page.evaluate(
            "document.querySelector('.lightforcing-player canvas').toDataURL('image/jpeg')"
        )

    def run(self) -> None:
        """Press Run."""
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def keep(self, name: str) -> None:
        """Keep a screenshot, where a folder for them is named."""
        folder = os.environ.get("LIGHTFORCING_PICTURES")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png")


# The widget called `name` of the node of a class.
_WIDGET = 'app.graph.nodes.find((n) => n.type === "{}").widgets.find((w) => w.name === name)'


@pytest.fixture
def open_page(server: Any, browser: Any) -> Iterator[Callable[..., Page]]:
    """Opens pages; afterwards none of them may have complained about our files."""
    pages: list[Page] = []

    def opened(*, html_nodes: bool = False, palette: str = "dark") -> Page:
        pages.append(Page(server, browser, html_nodes=html_nodes, palette=palette))
        return pages[-1]

    yield opened
    server.ask("/interrupt", {})
    for page in pages:
        page.page.close()
        assert not page.complaints


def test_a_slider_moved_while_a_video_is_made_acts_on_its_next_chunks(
    server: Any, open_page: Callable[..., Page]
) -> None:
    page = open_page()
    page.load("first_video", length=321, seed=201)
    page.until("document.querySelector('.lightforcing-growth')")
    before, curve = page.value(SPARSE, "target_sparsity"), page.curve()
    page.drag("target_sparsity", before / 0.99, 0.8)
    assert page.value(SPARSE, "target_sparsity") < before
    end = time.monotonic() + 5
    while page.curve() == curve:
        assert time.monotonic() < end, "the curve was not drawn again"
        time.sleep(0.05)

    page.run()
    page.until("document.querySelectorAll('.lightforcing-mark').length >= 3")
    first = page.picture()
    end = time.monotonic() + 10
    while page.picture() == first:
        assert time.monotonic() < end, "the preview stands still"
        time.sleep(0.05)

    used = page.marks()
    page.drag("target_sparsity", 0.8, 0.65)
    page.page.mouse.move(20, 700)  # away: no tooltip
    page.until(f"document.querySelectorAll('.lightforcing-mark').length >= {len(used) + 4}")
    marks = page.marks()
    assert all(marks[chunk] == sparsity for chunk, sparsity in used.items())
    late = max(marks)
    assert marks[late] < used[max(used)], "left alone, it only grows"
    (run,) = server.ask("/lightforcing/live")[1]["runs"]
    assert run["chunks"][late]["sparsity"] == pytest.approx(marks[late])
    target = run["chunks"][late]["settings"]["schedule"]["target"]
    assert target == pytest.approx(page.value(SPARSE, "target_sparsity"))
    page.keep("live_dark")

    page.open()  # in mid-run
    page.until(f"document.querySelectorAll('.lightforcing-mark').length > {late}")
    again = page.marks()
    assert all(again[chunk] == pytest.approx(sparsity) for chunk, sparsity in marks.items())
    restored = page.picture()
    end = time.monotonic() + 10
    while page.picture() == restored:
        assert time.monotonic() < end, "no frames after the page was loaded again"
        time.sleep(0.05)
    server.ask("/interrupt", {})
    page.until("document.querySelector('.lightforcing-status')?.textContent.includes('stopped')")


def test_nodes_made_of_html_in_a_light_theme_do_the_same(
    server: Any, open_page: Callable[..., Page]
) -> None:
    page = open_page(html_nodes=True, palette="light")
    page.load("first_video", length=45, seed=202)
    page.until("document.querySelector('.lightforcing-growth')")
    curve = page.curve()
    page.set(SPARSE, "target_sparsity", 0.7)
    page.until(f"document.querySelector('.lightforcing-growth').outerHTML !== {json.dumps(curve)}")
    page.run()
    page.until("document.querySelectorAll('.lightforcing-mark').length >= 2")
    page.keep("live_light")
    page.until("document.querySelectorAll('.lightforcing-mark').length === 4")
    page.until("document.querySelector('video')?.readyState >= 2")
    assert "45 frames" in page.status()
    canvas = "document.querySelector('.lightforcing-player canvas')?.checkVisibility()"
    assert not page.page.evaluate(canvas), "the finished video has taken its place"
    page.keep("finished_light")

    page.set(STREAM, "seed", 203)
    page.run()
    page.until(canvas)
    page.until("document.querySelectorAll('.lightforcing-mark').length === 4")


def test_another_workflow_does_not_take_a_run_over(
    server: Any, open_page: Callable[..., Page]
) -> None:
    """Its nodes have the same ids: their sliders are their own, and show nothing of the run."""
    page = open_page()
    page.load("first_video", length=321, seed=204)
    page.until("document.querySelector('.lightforcing-growth')")
    page.run()
    page.until("document.querySelectorAll('.lightforcing-mark').length >= 2")
    (run,) = server.ask("/lightforcing/live")[1]["runs"]
    target = run["settings"]["schedule"]["target"]

    page.load("sparsity_playground")
    page.until("document.querySelector('.lightforcing-growth')")
    assert page.value(SPARSE, "target_sparsity") != 0.31
    page.set(SPARSE, "target_sparsity", 0.31)
    chunks = len(run["chunks"])
    end = time.monotonic() + _WAIT_SECONDS
    while len(run["chunks"]) < chunks + 2:
        assert time.monotonic() < end, "the run does not go on"
        time.sleep(0.1)
        (run,) = server.ask("/lightforcing/live")[1]["runs"]
    assert run["settings"]["schedule"]["target"] == target
    assert page.marks() == {}
    server.ask("/interrupt", {})


def test_a_preset_sets_the_sliders_it_rules(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.load("first_video")

    page.set(SPARSE, "preset", "long video")
    page.until_value(SPARSE, "keep_frames", 3)
    assert page.value(SPARSE, "target_sparsity") == 0.85
    page.set(SPARSE, "target_sparsity", 0.5)
    page.until_value(SPARSE, "preset", "custom")
    assert page.value(SPARSE, "keep_frames") == 3


def test_workflows_open_as_their_api_twins(open_page: Callable[..., Page]) -> None:
    page = open_page()
    for path in WORKFLOWS:
        page.load(path.stem)
        opened = page.page.evaluate("async () => (await app.graphToPrompt()).output")
        twin = json.loads((path.parent / "api" / path.name).read_text())
        plain = [
            {i: (n["class_type"], n["inputs"]) for i, n in graph.items()}
            for graph in (opened, twin)
        ]
        assert plain[0] == plain[1], path.stem
        page.keep(f"workflow_{path.stem}")


def test_nodes_of_a_subgraph_are_found(server: Any, open_page: Callable[..., Page]) -> None:
    """Their ids on the server are paths: those of the nodes they lie in come first."""
    page = open_page()
    page.load("first_video", length=21, seed=204)
    page.page.evaluate(
        f"""() => {{
            const inner = app.graph.nodes.filter((n) => ["{SPARSE}", "{STREAM}"].includes(n.type));
            app.graph.convertToSubgraph(new Set(inner));
            const outer = app.graph.nodes.find((n) => n.subgraph);
            app.canvas.openSubgraph(outer.subgraph, outer);
        }}"""
    )
    page.run()
    page.until("document.querySelectorAll('.lightforcing-mark').length === 2")


@pytest.mark.parametrize("html_nodes", [False, True], ids=["canvas", "html"])
def test_a_benchmark_shows_its_report_to_be_copied(
    open_page: Callable[..., Page], html_nodes: bool
) -> None:
    """Whole lines of it, and the node stays where it is when they are selected."""
    page = open_page(html_nodes=html_nodes, palette="light" if html_nodes else "dark")
    page.page.evaluate(
        f"""() => {{
            app.graph.clear();
            const [load, sparse, benchmark] = [
                "LightForcingLoadModel", "{SPARSE}", "{BENCHMARK}",
            ].map((type, place) => {{
                const node = LiteGraph.createNode(type);
                node.pos = [40 + 400 * place, 80];
                app.graph.add(node);
                return node;
            }});
            load.connect(0, sparse, 0);
            sparse.connect(0, benchmark, 0);
            load.connect(2, benchmark, benchmark.findInputSlot("vae"));
        }}"""
    )
    for widget, value in {"width": 256, "height": 128, "length": 33, "videos": 1}.items():
        page.set(BENCHMARK, widget, value)
    page.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    report = "document.querySelector('.lightforcing-report')"
    page.until(f"{report}?.textContent.includes('after a run')")
    page.run()
    page.until(f"{report}.textContent.includes('One more video under the profiler')")
    text = page.page.evaluate(f"{report}.textContent")
    assert "33 frames of 256x128" in text and "forwards   plain (" in text
    page.until(f"{report}.scrollWidth <= {report}.clientWidth", seconds=5)
    page.until(f"{report}.scrollHeight <= {report}.clientHeight", seconds=5)
    time.sleep(1)  # the picture comes below, and the node grows
    page.keep(f"benchmark_{'html' if html_nodes else 'canvas'}")

    place = f"app.graph.nodes.find((n) => n.type === '{BENCHMARK}').pos.join()"
    before, box = (
        page.page.evaluate(place),
        page.page.locator(".lightforcing-report").bounding_box(),
    )
    mouse = page.page.mouse
    mouse.move(box["x"] + 4, box["y"] + 4)
    mouse.down()
    mouse.move(box["x"] + 200, box["y"] + 60, steps=6)
    mouse.up()
    assert "device     cpu\n" in page.page.evaluate("getSelection().toString()")
    assert page.page.evaluate(place) == before
