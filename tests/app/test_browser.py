"""The pages as people see them, in headless Chromium: narrow and wide, light and dark."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

if CHROMIUM is None:
    pytest.skip("no Chromium is installed here: apt-get install chromium", allow_module_level=True)

# Relative luminance and contrast as WCAG 2 defines them, of every piece of text against what is behind it.
LOWEST_CONTRAST = """
() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const behind = node => {
    for (let n = node; n; n = n.parentElement) {
      const c = parse(getComputedStyle(n).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let lowest = [99, ''];
  for (const node of document.querySelectorAll('h1, h2, p, th, td, figcaption, summary, pre')) {
    if (!node.textContent.trim()) continue;
    const [a, b] = [luminance(parse(getComputedStyle(node).color)), luminance(behind(node))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < lowest[0]) lowest = [contrast, node.textContent.trim().slice(0, 40)];
  }
  return lowest;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> dict[str, Path]:
    """A run's report and a comparison's, made by the commands."""
    import yaml

    from fedrot.app.cli.main import main

    place = tmp_path_factory.mktemp("pages")
    data = {"path": str(tiny_data), "train": "train.csv", "validation": "validation.csv", "group": "group"}
    recipe = {
        "name": "pages",
        "rounds": 3,
        "compute": {"threads": 1},
        "model": {"path": str(tiny_model)},
        "lora": {"rank": 2},
        "data": {**data, "max_length": 64},
        "partition": {"kind": "column"},
        "local": {"lr": 0.01, "batch": 8, "steps": 2},
        "diagnostics": {"rho": True},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--methods", "fedit,fedrot,fedsa,flexlora", "--seeds", "0,1", "--sweep", "method.strength=0,1"]
    assert main(["compare", str(place / "recipe.yaml"), "--out", str(place / "compared"), *words]) == 0
    runs = [str(place / "compared" / name / "seed-0") for name in ("fedit", "fedrot_strength=1")]
    assert main(["report", *runs, "--out", str(place / "report")]) == 0
    return {"comparison": place / "compared" / "report.html", "report": place / "report" / "report.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_is_whole_and_readable(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []

    figures = page.eval_on_selector_all("figure img", "all => all.map(i => [i.alt, i.naturalWidth, i.clientWidth])")
    drawn = sorted(path.stem for path in (pages[name].parent / "figures").glob("*.png"))
    assert len(figures) == len(drawn) >= 6
    for caption, natural, shown in figures:
        assert natural > 400, caption
        assert 250 < shown <= width, caption
    # Wide tables scroll in their own box: the page itself never moves sideways.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast, text = page.evaluate(LOWEST_CONTRAST)
    assert contrast >= 4.5, text
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p, td')].map(n => parseFloat(getComputedStyle(n).fontSize)))"
    )
    assert smallest >= 13
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == (scheme == "dark")
    page.close()
