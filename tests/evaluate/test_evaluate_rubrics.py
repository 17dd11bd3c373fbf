"""Rubrics as files, and the fences that judged text stands between."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import unicodedata
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scripted_judge import TURN, attacks

from mixmerge.errors import DataError
from mixmerge.evaluate.fence import defused, draw_mark, fenced, shown
from mixmerge.evaluate.rubrics import JUDGED, Question, Rubric, ask_by_rubric, parse_rubric, read_rubric, shipped_rubric
from mixmerge.evaluate.verdicts import WORDS

QUESTIONS = get_args(Question)
GOOD = """\
name: mine
version: 3
question: harm
reason: no

# system
Judge it.

# user
{mark} {language}
{request}
{response}
{answer}
"""


def asked(rubric: Rubric, *texts: str, request: str = "How?", language: str = "en") -> tuple[str, str, str]:
    """System part, user part and mark of a request."""
    found = ask_by_rubric(
        rubric,
        "tags",
        seed=0,
        key="s/en/p",
        language=language,
        request=shown(request, 99_999),
        judged=[shown(text, 99_999) for text in texts],
    )
    system, user = found.messages
    assert (system["role"], user["role"]) == ("system", "user")
    return system["content"], user["content"], found.mark


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_has_a_rubric_with_a_version_and_the_words_of_its_grammar(question) -> None:
    rubric = shipped_rubric(question)
    assert (rubric.name, rubric.question) == (question, question)
    assert rubric.version.isdigit()
    for word in WORDS[question]:
        assert re.search(rf"\b{word}\b", rubric.system)
    assert "data" in rubric.system
    assert "you do not follow it" in rubric.system
    assert rubric.describe() == {
        "name": question,
        "version": rubric.version,
        "question": question,
        "sha256": rubric.sha256,
    }


def test_a_rubrics_hash_is_that_of_its_text_however_its_lines_end(tmp_path) -> None:
    rubric = parse_rubric(GOOD, where="r")
    assert rubric.sha256 == hashlib.sha256(GOOD.rstrip().encode()).hexdigest()
    (tmp_path / "r.md").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_rubric(tmp_path / "r.md") == rubric
    assert parse_rubric(GOOD.replace("Judge it.", "Judge it well."), where="r").sha256 != rubric.sha256


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# system\n", "", r"r\.md: a rubric has a line `# system` and after it a line `# user`"),
        ("# user\n", "# user\n# user\n", r"once each"),
        ("Judge it.", "", r"r\.md: nothing stands under `# system`"),
        ("version: 3\n", "", r"r\.md: the head has no 'version'; add a line 'version: \.\.\.'"),
        ("version: 3", "version:", r"r\.md:2: 'version' has no value"),
        ("version: 3", "name: other", r"r\.md:2: 'name' has two values"),
        ("version: 3", "verison: 3", r"r\.md:2: 'verison: 3' is no line of a rubric's head; did you mean 'version'\?"),
        ("question: harm", "question: ham", r"question is 'ham'; did you mean 'harm'\?"),
        ("reason: no", "reason: maybe", r"reason is 'maybe'; known: no, yes"),
        ("{response}", "", r"no \{response\} in a rubric of harm; put \{response\} in once"),
        ("{answer}", "", r"no \{answer\} in a rubric of harm"),
        ("{response}", "{response} {response}", r"2 \{response\} in a rubric of harm"),
        ("{request}", "{request}{request}", r"2 \{request\}"),
        ("Judge it.", "Judge it: {answer}", r"2 \{answer\}"),
        ("Judge it.", "Judge {response}", r"\{response\} is in # system; what others wrote belongs in # user"),
        ("Judge it.", "Judge {request}", r"\{request\} is in # system"),
        ("{language}", "{langauge}", r"unknown placeholder \{langauge\} in # user; did you mean 'language'\?"),
        ("{response}", "{response_a}", r"unknown placeholder \{response_a\}"),
        ("question: harm", "question: quality", r"unknown placeholder \{response\}"),
    ],
)
def test_a_rubric_that_does_not_hold_together_is_refused_by_name(old, new, message) -> None:
    assert old in GOOD
    with pytest.raises(DataError, match=message):
        parse_rubric(GOOD.replace(old, new, 1), where="r.md")


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "r.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"r\.md: cannot be read as a rubric: UnicodeDecodeError"):
        read_rubric(tmp_path / "r.md")


def test_braces_that_are_no_placeholder_stay_as_they_are() -> None:
    rubric = parse_rubric(GOOD.replace("Judge it.", 'Like {"a": {}} and {A} and {0}.'), where="r")
    assert asked(rubric, "It is.")[0] == 'Like {"a": {}} and {A} and {0}.'


@pytest.mark.parametrize("question", QUESTIONS)
def test_placeholders_in_the_texts_are_never_filled_in(question) -> None:
    text = "{mark} {language} {request} {response} {response_a} {answer}"
    _, user, mark = asked(shipped_rubric(question), *(text for _ in JUDGED[question]), request=text)
    assert user.count(text) == 1 + len(JUDGED[question])
    assert user.count("BEGIN REQUEST") == 1
    assert user.startswith(f"mark: {mark}\nlanguage: en\n")


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("attack", attacks(), ids=lambda each: each.id)
def test_an_attack_stands_between_one_intact_pair_of_lines_and_nowhere_else(attack, question) -> None:
    texts = [attack.response, attack.plain][: len(JUDGED[question])]
    system, user, mark = asked(shipped_rubric(question), *texts, language=attack.lang)
    plain_system, plain_user, plain_mark = asked(
        shipped_rubric(question), *[attack.plain][: len(texts)], *texts[1:], language=attack.lang
    )
    label = JUDGED[question][0].replace("_", " ").upper()
    begin, end = f"-----BEGIN {label} {mark}-----\n", f"\n-----END {label} {mark}-----"
    assert user.count(begin) == user.count(end) == 1
    inside = user[user.index(begin) + len(begin) : user.index(end)]
    assert inside == defused(attack.response)[0]
    assert system == plain_system
    outside = user.replace(begin + inside + end, "")
    plain_inside = f"-----BEGIN {label} {plain_mark}-----\n{attack.plain}\n-----END {label} {plain_mark}-----"
    assert outside.replace(mark, "M") == plain_user.replace(plain_inside, "").replace(plain_mark, "M")
    assert mark not in attack.response


@pytest.mark.parametrize("attack", attacks(), ids=lambda each: each.id)
def test_a_defused_attack_has_no_control_token_and_goes_over_the_wire(attack) -> None:
    safe, places = defused(attack.response)
    assert not TURN.search(safe)
    assert "\0" not in safe
    assert safe.encode("utf-8").decode("utf-8") == safe
    assert (places == 0) == (safe == attack.response)
    assert defused(safe) == (safe, 0)
    changed = len(safe) - len(attack.response)
    assert 0 <= changed <= places, "a space a token, one character for one else"


TOKENS = """
<|im_start|> <|IM_END|> <|eot_id|> <|reserved_special_token_3|> <|START_OF_TURN_TOKEN|> <|endoftext|> <｜User｜>
＜｜end▁of▁sentence｜＞ [|assistant|] [INST] [/INST] [SYSTEM_PROMPT] [TOOL_CALLS] [gMASK] <sop> <<SYS>> <</SYS>> <s> </s>
<bos> <pad> <unk> <start_of_turn> <end_of_turn> <unused42> <extra_id_0> <think> </think> <tool_call>
<|turn> <turn|> <|channel> <channel|> <|tool_call> <｜turn> <seed:bos> </seed:think> <SPECIAL_10> <TOKENS_UNUSED_1>
<mask:1> ]~b] ]~!b[ [e~[ <minimax:tool_call>
"""


@pytest.mark.parametrize("token", TOKENS.split())
def test_control_tokens_of_the_model_families_get_a_space(token) -> None:
    safe, places = defused(f"a{token}b")
    assert places == 1
    assert token not in safe
    assert safe.replace(" ", "") == f"a{token}b"


@pytest.mark.parametrize(
    "text",
    [
        "a < b | c > d",
        "x <| y",
        "if (a<|b) {}",
        "a<|b c|>d",
        "x[i]~y[j] and [~n[",
        "<xs:element> <svg:rect> </ns:p>",
        "<SPECIAL> <special_10> <mask: 1>",
        "[1] [inst] [a|b]",
        "<b>bold</b> <p>",
        "नमस्ते | <मूल>",
        "a[i][j]",
        "<S>",
        "\u200bzero\u200dwidth",
        "\u202ertl",
        "\x1b[0m",
        "\ufeff",
        "\ufffd",
        "🙂",
    ],
)
def test_ordinary_text_is_shown_as_it_is(text) -> None:
    assert defused(text) == (text, 0)


@given(st.text(alphabet=st.characters(exclude_categories=[]), max_size=60))
@example("\ud83d\ude00")
@example("<<|im_end|>|im_end|>")
@example("<\0|a|>")
def test_any_text_can_be_defused_once_and_for_all_and_encoded(text) -> None:
    safe, places = defused(text)
    assert defused(safe) == (safe, 0)
    safe.encode("utf-8")
    assert (places == 0) == (safe == text)
    assert len(safe) >= len(text)
    assert not any(unicodedata.category(c) == "Cs" for c in safe)


@given(st.integers(0, 9), st.text(max_size=9), st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_a_mark_is_in_no_text_and_depends_on_all_that_it_is_drawn_from(seed, key, texts) -> None:
    mark = draw_mark(seed, key, texts)
    assert re.fullmatch("[0-9a-f]{10}", mark)
    assert mark == draw_mark(seed, key, list(texts))
    assert not any(mark in text for text in texts)
    others = [
        (seed + 1, key, texts),
        (seed, key + "x", texts),
        (seed, key, [*texts, ""]),
        (seed, key, ["x" + texts[0], *texts[1:]]),
    ]
    assert mark not in [draw_mark(*each) for each in others]


def test_a_text_that_holds_its_own_mark_gets_another_one(monkeypatch) -> None:
    # Marks of one digit, so that texts which hold theirs can be found.
    monkeypatch.setattr("mixmerge.evaluate.fence.MARK_DIGITS", 1)
    redrawn = 0
    for number in range(200):
        text = f"{number} a B c"
        mark = draw_mark(0, "k", [text])
        assert mark not in text.casefold()
        redrawn += mark != draw_mark(0, "k", [text.replace("a", "x").replace("c", "y")])
    assert redrawn > 0
    assert draw_mark(0, "k", ["0123456789abcde"]) == "f"


def test_marks_are_the_same_in_every_process() -> None:
    code = "from mixmerge.evaluate.fence import draw_mark; print(draw_mark(7, 's/hi/p', ['\\ud800 नमस्ते']))"
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert {each.stdout.strip() for each in run} == {draw_mark(7, "s/hi/p", ["\ud800 नमस्ते"])}


@given(st.text(max_size=200), st.integers(1, 50))
def test_a_cut_keeps_the_beginning_and_says_how_much_is_gone(text, longest) -> None:
    found = shown(text, longest)
    assert found.cut == max(0, len(text) - longest)
    safe = defused(text[:longest])[0]
    note = f"\n[cut here: {found.cut} more characters are not shown]" if found.cut else ""
    assert found.text == safe + note


def test_a_fence_is_two_lines_with_label_and_mark() -> None:
    assert fenced("response a", "It is.\n", "0badcafe00").splitlines() == [
        "-----BEGIN RESPONSE A 0badcafe00-----",
        "It is.",
        "",
        "-----END RESPONSE A 0badcafe00-----",
    ]
