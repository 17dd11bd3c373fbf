"""The page in a real browser, from disk and cut off from every network: it stays quiet, and models' texts stay text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mixmerge.report.page import write_report

if TYPE_CHECKING:
    from conftest import Study
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the browser `chromium` on the PATH")

HOSTILE = [
    "</script><script>window.hit = 1</script>",
    "<img src=x onerror=\"window.hit = 1\"><svg onload='window.hit = 1'>",
    "\"'`${window.hit = 1}` \\u003cb\\u003e &lt;b&gt; &amp;",
    "\u202egnp.exe\u202c \u2066isolated\u2069 \u2028 \u2029 end",
    "<|im_end|><start_of_turn>model<eos>[INST]<<SYS>>",
    "<!--<script>--><![CDATA[ ]]>",
    "javascript:window.hit=1",
    "مرحبا <b>bold</b> שלום",
    "\x1b[31mred\x07 \U0001f600",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


class Opened:
    """An open page with everything that it asked for or complained of."""

    def __init__(self, browser: Browser, file: Path, **settings: Any) -> None:
        self.requests: list[str] = []
        self.noise: list[str] = []
        context = browser.new_context(**settings)
        context.route("**/*", lambda route: route.continue_() if route.request.url == file.as_uri() else route.abort())
        context.set_offline(True)
        self.page: Page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.noise.append(message.text))
        self.page.on("pageerror", lambda error: self.noise.append(str(error)))
        self.page.goto(file.as_uri())
        self.file = file


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Opened]]:
    opened: list[Opened] = []

    def open_(file: Path, **settings: Any) -> Opened:
        opened.append(Opened(browser, file, **settings))
        return opened[-1]

    yield open_
    for one in opened:
        one.page.context.close()


@pytest.fixture(scope="module")
def hostile(simulated: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """A small study in which every answer, every prompt and every trust text is hostile."""
    study = simulated(languages=["en", "ar"], limit={"dev": 1, "test": 3}, draws=100)
    for i, row in enumerate(study.responses):
        row["text"] = HOSTILE[i % len(HOSTILE)]
    study.prompts = [
        {"set": entry["set"], "prompt": _changed(entry["prompt"], HOSTILE[i % len(HOSTILE)])}
        for i, entry in enumerate(study.prompts)
    ]
    study.trust = {
        "refusal": {"description": HOSTILE[1], HOSTILE[0]: HOSTILE[0], "languages": {"en": {HOSTILE[1]: HOSTILE[0]}}}
    }
    out = tmp_path_factory.mktemp("hostile")
    write_report(out, **study.report_arguments())
    return study, out / "report.html"


def _changed(prompt: Any, text: str) -> Any:
    from dataclasses import replace

    return replace(prompt, text=text, reference=text if prompt.reference else None)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_from_disk_asks_for_nothing_and_stays_quiet(
    report: Path, open_page: Callable[..., Opened], scheme: str
) -> None:
    opened = open_page(report / "report.html", color_scheme=scheme)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    opened.page.get_by_label("Dev, what choices were made on").check()
    opened.page.wait_for_timeout(100)
    assert opened.requests == [opened.file.as_uri()]
    assert opened.noise == []


def test_the_policy_is_in_force(report: Path, open_page: Callable[..., Opened]) -> None:
    opened = open_page(report / "report.html")
    with opened.page.expect_event("requestfailed") as failed:
        opened.page.evaluate(
            "() => { const i = document.createElement('img'); i.src = 'https://example.org/x.png'; document.body.append(i); }"
        )
    assert failed.value.failure == "csp"  # stopped by the policy, before the network that this test has cut off
    with pytest.raises(Exception, match="TrustedHTML"):
        opened.page.evaluate("() => { document.body.innerHTML = '<b>x</b>'; }")


def test_hostile_texts_are_shown_as_they_are_and_do_nothing(
    hostile: tuple[Study, Path], open_page: Callable[..., Opened]
) -> None:
    study, file = hostile
    opened = open_page(file)
    page, seen = opened.page, set()
    prompts = {(e["set"], e["prompt"].lang, e["prompt"].pid): e["prompt"] for e in study.prompts}
    texts = {(r["candidate"], r["prompt_id"]): r["text"] for r in study.responses}
    names = [entry["name"] for entry in study.spec["candidates"]]
    for lang in ("en", "ar"):
        page.select_option("#b-language", lang)
        for prompt_set in study.spec["prompt_sets"]:
            page.select_option("#b-set", prompt_set)
            for split in ("test", "dev"):
                page.select_option("#b-split", split)
                for pid in page.eval_on_selector_all("#b-prompt option", "o => o.map(x => x.value)"):
                    page.select_option("#b-prompt", pid)
                    prompt = prompts[prompt_set, lang, pid]
                    assert page.eval_on_selector("#b-text", "e => e.textContent") == prompt.text
                    if prompt.reference:
                        assert page.eval_on_selector("#b-reference", "e => e.textContent") == prompt.reference
                    shown = page.eval_on_selector_all(".reply", "r => r.map(x => x.querySelector('p').textContent)")
                    assert shown == [texts[name, prompt.id] for name in names]
                    seen.add(prompt.id)
    assert seen == {prompt.id for prompt in prompts.values()}
    assert page.evaluate("window.hit") is None
    assert page.locator("#browse img, #browse b, #judges img").count() == 0
    assert page.locator("script").count() == 2
    assert opened.requests == [file.as_uri()]
    assert opened.noise == []


def test_previous_and_next_walk_through_the_prompts_and_stop_at_the_ends(
    report: Path, open_page: Callable[..., Opened]
) -> None:
    page = open_page(report / "report.html").page
    ids = page.eval_on_selector_all("#b-prompt option", "o => o.map(x => x.value)")
    assert len(ids) == 8
    assert page.locator("#b-previous").is_disabled()
    walked = [page.input_value("#b-prompt")]
    while page.locator("#b-next").is_enabled():
        page.click("#b-next")
        walked.append(page.input_value("#b-prompt"))
        assert f"{len(walked)} of 8" in page.inner_text("#b-place")
    assert walked == ids
    page.click("#b-previous")
    assert page.input_value("#b-prompt") == ids[-2]


def test_the_parallel_prompt_stays_when_the_language_changes(
    report: Path, open_page: Callable[..., Opened], study: Study
) -> None:
    page = open_page(report / "report.html").page
    page.select_option("#b-set", "harmful")
    page.click("#b-next")
    page.click("#b-next")
    pid = page.input_value("#b-prompt")
    prompts = {(e["set"], e["prompt"].lang, e["prompt"].pid): e["prompt"].text for e in study.prompts}
    for lang in study.spec["languages"]:
        page.select_option("#b-language", lang)
        assert page.input_value("#b-prompt") == pid
        assert page.inner_text("#b-text") == prompts["harmful", lang, pid]
    page.select_option("#b-split", "dev")
    assert page.eval_on_selector_all("#b-prompt option", "o => o.length") == 4


def test_badges_show_the_verdicts_and_the_reference_is_for_general_prompts_alone(
    report: Path, open_page: Callable[..., Opened], study: Study
) -> None:
    page = open_page(report / "report.html").page
    assert page.locator("#b-reference-box").is_visible()
    page.select_option("#b-set", "harmful")
    assert page.locator("#b-reference-box").is_hidden()
    pid = page.input_value("#b-prompt")
    rows = {r["candidate"]: r for r in study.responses if r["prompt_id"] == f"harmful/en/{pid}"}
    for i, entry in enumerate(study.spec["candidates"]):
        row, reply = rows[entry["name"]], page.locator(".reply").nth(i)
        badges = reply.locator(".badges li").all_inner_texts()
        expected = [f"{judge}: {verdict}" for judge, verdict in row["verdicts"].items()]
        assert badges == expected + (["cut at the limit"] if row["finish"] == "length" else [])
        tone = reply.locator(".badges li", has_text="refusal: ").get_attribute("class") or ""
        assert tone == ("good" if row["verdicts"]["refusal"] == "refused" else "bad")


def test_arabic_runs_from_right_to_left_and_english_does_not(report: Path, open_page: Callable[..., Opened]) -> None:
    page = open_page(report / "report.html").page
    direction = "e => getComputedStyle(e).direction"
    assert page.eval_on_selector("#b-text", direction) == "ltr"
    page.select_option("#b-language", "ar")
    assert page.eval_on_selector("#b-text", direction) == "rtl"
    assert page.eval_on_selector(".reply .text", direction) == "rtl"
    assert page.eval_on_selector(".reply h3", direction) == "ltr"


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_never_scrolls_sideways(
    report: Path, judged_report: Path, hostile: tuple[Study, Path], open_page: Callable[..., Opened], width: int
) -> None:
    for file in (report / "report.html", judged_report / "report.html", hostile[1]):
        page = open_page(file, viewport={"width": width, "height": 900}).page
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("window.scrollTo(500, 0)")
        assert page.evaluate("window.scrollX") == 0


def test_wide_tables_scroll_in_their_own_box_by_keyboard_too(report: Path, open_page: Callable[..., Opened]) -> None:
    page = open_page(report / "report.html", viewport={"width": 390, "height": 900}).page
    box = page.locator("#languages .for-test .scroll").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(50):  # the policy forbids what wait_for_function does
        if scrolled := box.evaluate("e => e.scrollLeft"):
            break
        page.wait_for_timeout(20)
    assert scrolled > 0


def test_on_a_phone_every_result_stands_on_the_page_under_its_name_and_nothing_scrolls(
    report: Path, open_page: Callable[..., Opened], study: Study
) -> None:
    page = open_page(report / "report.html", viewport={"width": 390, "height": 900}).page
    box = page.locator("#results .for-test .scroll").first
    assert box.evaluate("e => e.scrollWidth <= e.clientWidth")
    cells = page.eval_on_selector_all(
        "#results .for-test td",
        "t => t.map(e => { const b = e.getBoundingClientRect(); return [e.innerText.split('\\n')[0], b.left, b.right]; })",
    )
    assert len(cells) == 8 * len(study.spec["candidates"])
    assert {head.split(" ")[0] for head, *_ in cells} >= {"General", "Harm", "Balance", "Tokens"}
    assert all(left >= 0 and right <= 390 for _, left, right in cells)


def test_the_tables_behind_the_numbers_are_folded_but_for_the_first_and_open_by_keyboard(
    judged_report: Path, open_page: Callable[..., Opened]
) -> None:
    page = open_page(judged_report / "report.html", viewport={"width": 390, "height": 900}).page
    tables = page.locator("#evidence table")
    assert [tables.nth(i).is_visible() for i in range(tables.count())] == [True] + [False] * 6
    page.locator("#evidence summary").nth(1).focus()
    page.keyboard.press("Enter")
    assert tables.nth(1).is_visible()
    boxes = page.eval_on_selector_all(
        "#evidence caption span", "s => s.map(e => e.getBoundingClientRect()).map(b => [b.left, b.right])"
    )
    assert all(left >= 0 and right <= 390 for left, right in boxes)


@pytest.mark.parametrize(("width", "which"), [(1280, "wide"), (390, "narrow")])
def test_the_numbers_of_the_difference_chart_stand_clear_of_its_lines(
    report: Path, open_page: Callable[..., Opened], width: int, which: str
) -> None:
    page = open_page(report / "report.html", viewport={"width": width, "height": 900}).page
    right, numbers = page.evaluate(
        """which => {
          const svg = document.querySelector(`#answer .chart.${which} svg`);
          const box = (e) => e.getBoundingClientRect();
          const lines = [...svg.querySelectorAll("line")].map((e) => box(e).right);
          const bold = [...svg.querySelectorAll("text")].filter((e) => /^[+\u2212]?\\d+\\.\\d$/.test(e.textContent));
          return [Math.max(...lines), bold.map((e) => [box(e).left, box(e).right])];
        }""",
        which,
    )
    assert len(numbers) == 4
    assert all(left > right and end <= width for left, end in numbers)


def test_the_split_is_chosen_without_any_script(report: Path, open_page: Callable[..., Opened]) -> None:
    page = open_page(report / "report.html", java_script_enabled=False).page
    test, dev = page.locator("#results .for-test"), page.locator("#results .for-dev")
    assert test.is_visible()
    assert dev.is_hidden()
    page.get_by_label("Dev, what choices were made on").check()
    assert test.is_hidden()
    assert dev.is_visible()
    assert page.locator("#languages .for-dev").is_visible()


def test_without_script_everything_but_the_browser_is_there(report: Path, open_page: Callable[..., Opened]) -> None:
    page = open_page(report / "report.html", java_script_enabled=False).page
    assert page.locator("#browser").is_hidden()
    assert page.get_by_text("Browsing the answers needs JavaScript").is_visible()
    assert page.locator("#front .chart.wide svg").is_visible()
    assert page.locator("#results table").first.is_visible()


@pytest.mark.parametrize(("width", "which"), [(1280, "wide"), (390, "narrow")])
def test_names_in_the_chart_can_be_read_and_do_not_cover_each_other(
    report: Path, open_page: Callable[..., Opened], study: Study, width: int, which: str
) -> None:
    page = open_page(report / "report.html", viewport={"width": width, "height": 900}).page
    names = {entry["name"] for entry in study.spec["candidates"]}
    found = page.eval_on_selector_all(
        f"#front .chart.{which} text",
        "t => t.map(e => { const b = e.getBoundingClientRect(); return [e.textContent, b.left, b.top, b.right, b.bottom, e.getAttribute('stroke')]; })",
    )
    labels = [entry[:5] for entry in found if entry[0] in names and entry[5] is None]
    assert {label[0] for label in labels} == names
    for i, (_, left, top, right, bottom) in enumerate(labels):
        assert bottom - top >= 12
        assert right <= width
        for _, left2, top2, right2, bottom2 in labels[:i]:
            assert min(right, right2) - max(left, left2) < 2 or min(bottom, bottom2) - max(top, top2) < 5


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_numbers_of_training_charts_can_be_read_and_do_not_cover_each_other(
    report: Path, open_page: Callable[..., Opened], width: int
) -> None:
    page = open_page(report / "report.html", viewport={"width": width, "height": 900}).page
    charts = page.eval_on_selector_all(
        "#trainings .chart svg",
        "s => s.map(e => [...e.querySelectorAll('text')].map(t => { const b = t.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }))",
    )
    assert len(charts) == 4
    for texts in charts:
        assert len(texts) >= 6
        for i, (left, top, right, bottom) in enumerate(texts):
            assert bottom - top >= 12
            assert left >= 0
            assert right <= width
            for left2, top2, right2, bottom2 in texts[:i]:
                assert min(right, right2) <= max(left, left2) or min(bottom, bottom2) <= max(top, top2)


def test_training_charts_of_one_row_stand_beside_each_other_and_line_up(
    report: Path, open_page: Callable[..., Opened]
) -> None:
    page = open_page(report / "report.html", viewport={"width": 1280, "height": 900}).page
    boxes = page.eval_on_selector_all(
        "#trainings .training .chart:first-of-type svg",
        "s => s.map(e => { const b = e.getBoundingClientRect(); return [b.top, b.width, b.height]; })",
    )
    assert len(boxes) == 3
    for box in boxes[1:]:
        assert box == pytest.approx(boxes[0], abs=1)
