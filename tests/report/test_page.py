"""The page in a real browser, Chromium without a window: what a person can do, and what hostile text cannot."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import FakeEngines, make_fake_bundle, write_rows

from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.report.pairs import RunPairs, read_pairs
from dpo_fast.report.write import write_report
from dpo_fast.tokens import load_tokenizer

from .made_runs import make_run, make_table

pytestmark = pytest.mark.slow

ATTACK = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\u2028`${window.hacked=1}`"
LEFT = "\u202eleft"  # writes what follows from right to left
ROWS = [
    {
        "prompt": f"Question {i}, {'whose needle is here' if i == 77 else 'plain'}?",
        "chosen": f" It is {i}." + "!" * (i % 7),
        "rejected": " I do not know",
        "kind": ("sky", "sea", "<b>bold</b><script>window.hacked=1</script>")[i % 3],
    }
    for i in range(120)
]
ROWS[4] |= {"prompt": f"Why {ATTACK}?", "chosen": f" {ATTACK}", "rejected": f" {LEFT}{ATTACK}", "kind": ATTACK}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 120 pairs with its report, samples and hostile text in every place that text can take."""
    folder = tmp_path_factory.mktemp("page")
    bundle = make_fake_bundle(folder / "bundle")
    dataset = write_rows(folder / f"{ATTACK.replace('/', '')[:60]}.jsonl", ROWS)
    options = EvaluateOptions(group_by="kind", max_length=250)
    evaluate(bundle, dataset, folder / "run", options, engine=FakeEngines())
    sample = {"row": 1, "prompt": ATTACK, "policy": ATTACK, "reference": ATTACK}
    (folder / "run" / "samples.jsonl").write_text(json.dumps(sample))
    write_report(folder / "run", bundle=bundle)
    return folder / "run"


@pytest.fixture(scope="module")
def pairs(run: Path) -> RunPairs:
    return read_pairs(run)


@pytest.fixture
def page(browser: Any, run: Path) -> Iterator[Any]:
    """The report, opened; what it asked for and what it complained of are kept."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.requested, page.complaints = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    open_report(page, run)
    yield page
    page.close()


def open_report(page: Any, run: Path) -> None:
    page.goto((run / "report.html").as_uri(), wait_until="commit")
    page.wait_for_selector("#pairs-table[data-texts]")


def column(page: Any, number: int) -> list[str]:
    """The texts of one column of the table's page; the first is 1."""
    texts: list[str] = page.locator(f"#pairs-table tbody tr:not(.details) > :nth-child({number})").all_inner_texts()
    return [text.strip() for text in texts]


def numbers(page: Any, number: int) -> list[float]:
    return [float(text.replace("−", "-")) for text in column(page, number)]


def wait_for_state(page: Any, text: str) -> None:
    page.locator("#pairs-state", has_text=text).wait_for()


def test_the_worst_margins_come_first(page: Any, pairs: RunPairs) -> None:
    worst = np.sort(pairs.margins)[:50]

    np.testing.assert_allclose(numbers(page, 2), worst, rtol=1e-3)  # four digits are shown
    assert page.locator("th[data-column=margin]").get_attribute("aria-sort") == "ascending"
    assert page.locator("#pairs-state").inner_text() == "120 pairs"
    assert page.title().endswith("120 pairs – DPO evaluation")


def test_a_columns_name_sorts_and_sorts_the_other_way(page: Any, pairs: RunPairs) -> None:
    page.get_by_role("button", name="tokens, chosen").click()
    assert numbers(page, 5) == sorted(pairs.sums.chosen_lengths.tolist())[:50]
    page.get_by_role("button", name="tokens, chosen").click()
    assert numbers(page, 5) == sorted(pairs.sums.chosen_lengths.tolist(), reverse=True)[:50]
    assert page.locator("th[data-column=chosenTokens]").get_attribute("aria-sort") == "descending"
    assert page.locator("th[aria-sort]").count() == 1

    page.get_by_role("button", name="row", exact=True).press("Enter")  # from the keyboard too
    assert numbers(page, 1) == list(range(1, 51))


def test_pages_hold_every_pair_once(page: Any) -> None:
    page.get_by_role("button", name="row", exact=True).click()
    seen = numbers(page, 1)
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_role("button", name="Next").click()
    seen += numbers(page, 1)
    page.get_by_label("Page").fill("3")
    page.get_by_label("Page").press("Enter")
    seen += numbers(page, 1)

    assert seen == list(range(1, 121))
    assert page.get_by_role("button", name="Next").is_disabled()
    page.get_by_label("Page").fill("99")
    page.get_by_label("Page").press("Enter")
    assert page.get_by_label("Page").input_value() == "3"


def test_searching_finds_texts_rows_and_subsets(page: Any) -> None:
    search = page.get_by_label("Search")
    search.fill("NEEDLE is")
    wait_for_state(page, "1 of 120 pairs")
    assert column(page, 1) == ["78"]

    search.fill("It is 41.")
    page.get_by_role("button", name="Row 42: ").wait_for()
    assert column(page, 1) == ["42"]

    search.fill("</script><img")
    page.get_by_role("button", name="Row 5: ").wait_for()
    assert column(page, 1) == ["5"]

    search.fill("(.*")  # a text, not an expression
    wait_for_state(page, "0 of 120 pairs")
    search.fill("")
    wait_for_state(page, "120 pairs")


def test_choices_narrow_the_table(page: Any, pairs: RunPairs) -> None:
    page.get_by_label("Show").select_option("wrong")
    wrong = int((pairs.margins <= 0).sum())
    wait_for_state(page, f"{wrong} of 120 pairs")
    page.get_by_label("Show").select_option("truncated")
    wait_for_state(page, f"{int(pairs.sums.truncated.sum())} of 120 pairs")
    page.get_by_label("Show").select_option("")
    page.locator("#subset").select_option("sea")
    wait_for_state(page, "39 of 120 pairs")
    assert set(column(page, 9)) == {"sea"}


def test_a_row_opens_to_its_texts_and_the_values_of_its_tokens(page: Any, run: Path) -> None:
    page.get_by_role("button", name="row", exact=True).click()
    button = page.get_by_role("button", name="Row 3: ")
    button.press("Enter")
    opened = page.locator("tr.details")
    opened.locator(".tokens").first.wait_for()

    assert button.get_attribute("aria-expanded") == "true"
    assert opened.locator(".text").first.inner_text() == ROWS[2]["prompt"]
    eos = load_tokenizer(run.parent / "bundle" / "policy").eos_token
    for place, name in enumerate(("chosen", "rejected")):
        assert opened.locator(".tokens").nth(place).text_content() == ROWS[2][name] + eos
    tokens = opened.locator(".tokens").first
    written = json.loads(
        (run / "report/data/tokens-00000.js").read_text().removeprefix('dpoFastReport.receive("tokens-00000",')[:-2]
    )[2]["chosen"]
    classes = [span.get_attribute("class") for span in tokens.locator("span").all()]
    assert ["down" in each for each in classes] == [value < 0 for value in written["values"]]

    tokens.focus()
    for value in written["values"][:3]:
        tokens.press("ArrowRight")
        shown = f"{'−' if value < 0 else '+'}{abs(value) / 100:.2f} nats"
        assert opened.locator(".readout").first.inner_text().endswith(shown)
    tokens.locator("span").nth(5).hover()
    assert opened.locator(".readout").first.inner_text().startswith("token 6 of ")

    button.click()
    assert page.locator("tr.details").count() == 0


def test_no_text_from_data_runs_wherever_it_stands(page: Any) -> None:
    page.get_by_role("button", name="row", exact=True).click()
    page.get_by_role("button", name="Row 5: ").click()
    opened = page.locator("tr.details")
    opened.locator(".tokens").first.wait_for()
    page.wait_for_selector("body[data-figures]")
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    time.sleep(0.2)  # what would run, runs by then

    assert opened.locator(".tokens").first.text_content().startswith(f" {ATTACK}")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("article .text").first.text_content() == ATTACK
    scripts = page.evaluate("[...document.scripts].filter((each) => !each.src).map((each) => each.type)")
    assert scripts == ["application/json"]
    assert page.locator("[data-chart] a, [data-chart] b").count() == 0


def test_what_is_slipped_into_the_page_itself_does_not_run(browser: Any, run: Path, tmp_path: Path) -> None:
    """The second line of defence: were some text not escaped, the page's policy would not let it run."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    path = folder / "report.html"
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", f"{ATTACK}</main>"), encoding="utf-8")
    page = browser.new_page()
    open_report(page, folder)
    page.wait_for_selector("body[data-figures]")

    assert page.locator("main img").count() == 1
    assert page.evaluate("window.hacked") is None
    page.close()


def test_figures_are_drawn_with_no_network_and_no_complaint(page: Any) -> None:
    page.wait_for_selector("body[data-figures]")

    names = {each.get_attribute("data-chart") for each in page.locator("[data-chart]").all()}
    assert names == {
        "margins", "rewards", "models", "ratios", "subsets", "lengths", "calibration", "betas", "losses"
    }  # fmt: skip
    assert page.locator("[data-chart] svg.main-svg").count() >= len(names)
    counts = page.evaluate("document.querySelector('[data-chart=margins]')._fullData.map((each) => Array.from(each.y))")
    assert np.sum(counts) == 120
    assert {url.split(":")[0] for url in page.requested} == {"file"}
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_no_width_overflows_and_text_stands_out_from_its_ground(
    browser: Any, run: Path, scheme: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    open_report(page, run)
    page.locator("#pairs-table tbody button").first.click()
    page.locator(".tokens").first.wait_for()
    page.wait_for_selector("body[data-figures]")

    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".frame").bounding_box()["width"] <= width
    ground, text, chart = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " getComputedStyle(document.querySelector('[data-chart] .xtitle')).fill]"
    )
    assert (brightness(ground) < 60) == (scheme == "dark")
    for colour in (text, chart):
        assert abs(brightness(colour) - brightness(ground)) > 150
    page.close()


def brightness(colour: str) -> float:
    """Mean of red, green and blue of `rgb(r, g, b)`."""
    return float(np.mean([float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]))


def test_every_control_and_table_has_a_name(page: Any) -> None:
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter((each) => !each.labels.length).length"
        " + [...document.querySelectorAll('table')].filter((each) => !each.caption?.textContent.trim()).length"
    )
    assert unnamed == 0
    assert page.evaluate("document.documentElement.lang") == "en"


def test_a_file_that_is_missing_is_named(browser: Any, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "report/data/tokens-00000.js").unlink()
    page = browser.new_page()
    open_report(page, folder)
    page.get_by_role("button", name="row", exact=True).click()
    page.get_by_role("button", name="Row 3: ").click()
    page.locator(".frame", has_text="tokens-00000.js could not be read").wait_for()
    page.close()


def test_100_000_pairs_open_in_under_3_seconds(browser: Any, tmp_path: Path) -> None:
    """The one limit in seconds that this page is asked to keep; about 0.5 s were seen on two shared cores."""
    bundle = make_fake_bundle(tmp_path / "bundle")
    tokenizer = load_tokenizer(bundle / "policy")
    printable = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).isprintable()]
    table = make_table(100_000, np.array(printable, np.int32), tokens=4)
    table.groups[:] = [None] * len(table)  # the intervals of subsets would take the most time of this test
    run = make_run(tmp_path / "run", bundle, table)
    write_report(run, bundle=bundle)
    page = browser.new_page(viewport={"width": 1400, "height": 900})

    began = time.perf_counter()
    page.goto((run / "report.html").as_uri(), wait_until="commit")
    page.locator("#pairs-table tbody tr").nth(49).wait_for()
    seconds = time.perf_counter() - began

    print(f"100,000 pairs: the table is there after {seconds:.2f} s")  # noqa: T201
    worst = np.sort(read_pairs(run).margins)[:50]
    np.testing.assert_allclose(numbers(page, 2), worst, rtol=1e-3)
    assert seconds < 3
    page.wait_for_selector("#pairs-table[data-texts]")
    page.get_by_label("Search").fill("99999")
    wait_for_state(page, "1 of 100,000 pairs")
    page.get_by_role("button", name="Row 99999: ").click()
    page.locator("tr.details .tokens").first.wait_for()
    page.close()
