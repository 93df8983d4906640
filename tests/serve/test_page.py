"""The page in a headless Chromium, against a real server with a tiny model."""

from __future__ import annotations

import json

import pytest

from browser import CHROMIUM, browser
from serve_support import serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def address(chat_model, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "first"
    (run / "evals" / "quick" / "step-4").mkdir(parents=True)
    (run / "evals" / "quick" / "step-4" / "result.json").write_text('{"scores": {"piqa": 0.61}}')
    steps = [{"kind": "step", "step": n, "loss": 9 - n, "gradient_norm": 1.0, "tokens": n * 64} for n in range(1, 9)]
    lines = [json.dumps(line) for line in [*steps, {"kind": "validation", "step": 4, "bits_per_byte": 2.5}]]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "step", "st']))
    (run / "recipe.yaml").write_text("data: <script>alert(1)</script>\n")
    (run / "report.html").write_text("<h1>report</h1><script>document.title = 'ran'</script>")
    with serving(chat_model, "--run", run) as found:
        yield found


@pytest.fixture(scope="module")
def browsing():
    with browser() as page:
        yield page


@pytest.fixture
def page(browsing, address):
    browsing.open(address)
    browsing.run("sessionStorage.clear(); localStorage.clear()")
    browsing.open(address)
    browsing.errors.clear()
    browsing.wait("model !== null")
    yield browsing
    assert browsing.errors == []


def say(page, text, longest=12):
    page.run(f"document.getElementById('text').focus(); at('sampling').elements.max_tokens.value = {longest}")
    page.type(text)
    page.press("Enter", "\r")


def test_a_message_is_answered_as_it_streams_and_answered_anew(page):
    assert "tiny" in page.run("at('hello').innerText")
    page.run("at('sampling').elements.temperature.value = 0")
    say(page, "hello")
    page.wait("messages.length === 2 && !busy")
    text = page.run("messages[1].content")
    assert text and "12 tokens" in page.run("at('messages').innerText")
    page.run("at('regenerate').click()")
    page.wait("busy === null && messages.length === 2 && messages[1].content")
    assert page.run("messages[1].content") == text
    say(page, "more")
    page.wait("messages.length === 4 && !busy")
    assert page.run("document.querySelectorAll('#regenerate').length") == 1
    assert page.run("request().messages.map((message) => message.role).join()") == "user,assistant,user,assistant"


def test_an_answer_is_stopped_by_a_key_and_the_conversation_cleared(page):
    say(page, "hello", longest=4000)
    page.wait("messages[1]?.content.length > 20")
    page.press("Escape")
    page.wait("!busy")
    assert page.run("messages[1].stats") == "stopped"
    assert page.run("at('stop').hidden && !at('send').hidden")
    page.run("at('new').click()")
    assert page.run("messages.length === 0 && !at('hello').hidden")


def test_what_a_model_says_is_never_html(page):
    said = "<img src=x onerror=alert(1)> **b** `c` [l](javascript:alert(1))\n\n```\n<b>\n```\n1. one\n2. two"
    page.run(
        f"messages = [{{role: 'assistant', content: {json.dumps(said)}}}, {{role: 'user', content: '<b>u</b>'}}]; show()"
    )
    assert page.run("document.querySelectorAll('#messages :is(img, a, b, script)').length") == 0
    assert page.run("document.querySelector('#messages pre code').textContent") == "<b>"
    assert page.run("document.querySelectorAll('#messages ol li').length") == 2
    assert page.run("document.querySelector('#messages strong').textContent") == "b"


def test_old_turns_that_no_longer_fit_are_dropped_and_said_to_be(page):
    page.run("messages = [{role: 'user', content: 'old '.repeat(3000)}, {role: 'assistant', content: 'x'}]; show()")
    say(page, "new")
    page.wait("!busy && messages.at(-1).role === 'assistant' && messages.length === 3")
    assert "2 oldest messages no longer fit" in page.run("at('messages').innerText")


def test_a_message_that_fits_no_context_costs_no_turns(page):
    page.run("messages = [{role: 'user', content: 'a'}, {role: 'assistant', content: 'b'}]; show()")
    say(page, "long " * 5000)
    page.wait("messages.at(-1).role === 'error' && !busy")
    assert page.run("messages.map(({role}) => role).join()") == "user,assistant,user,error"
    assert "maximum context length" in page.run("messages.at(-1).content")


def test_a_conversation_is_exported(page):
    page.run("messages = [{role: 'user', content: 'hello'}, {role: 'assistant', content: 'there'}]; show()")
    saved = "(() => { let its; save = (name, kind, content) => its = content; exported('%s'); return its; })()"
    exported = json.loads(page.run(saved % "json"))
    assert exported["messages"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    assert exported["digest"].startswith("sha256:") and "temperature" in exported["sampling"]
    assert page.run(saved % "md") == "**You**\n\nhello\n\n**tiny**\n\nthere\n"


def test_errors_are_shown_and_theme_panel_and_facts_work(page):
    page.run("model.id = 'other'")
    say(page, "hello")
    page.wait("messages.at(-1).role === 'error'")
    assert "'other' is not served here" in page.run("at('messages').innerText")
    before = page.run("getComputedStyle(document.body).backgroundColor")
    page.run("at('theme').click()")
    assert page.run("getComputedStyle(document.body).backgroundColor") != before
    facts = page.run("at('facts').innerText")
    assert "sha256:" in facts and "float32" in facts and "8 requests" in facts


def test_the_run_is_reported_with_its_curves_and_its_own_report(page):
    page.wait("!at('tab-run').hidden")
    page.run("at('tab-chat').focus()")
    page.press("ArrowRight")
    assert page.run("!at('run').hidden && at('chat').hidden")
    text = page.run("at('run').innerText")
    assert "8 steps" in text and "piqa" in text and "0.61" in text and "<script>alert(1)</script>" in text
    assert page.run("document.querySelectorAll('.curve').length") == 2  # one validation makes no curve
    assert page.run("document.querySelector('#run iframe').getAttribute('sandbox')") == "allow-scripts"


def test_on_a_phone_nothing_is_wider_than_the_screen(page, address):
    page.open(address, 360, 740, dark=True)
    page.wait("model !== null")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run("getComputedStyle(at('panel')).visibility") == "hidden"
    page.run("at('panel-toggle').click()")
    page.wait("getComputedStyle(at('panel')).visibility === 'visible'")
    page.press("Escape")
    page.wait("getComputedStyle(at('panel')).visibility === 'hidden'")
    assert page.run("document.documentElement.dataset.theme") == "dark"


def test_the_server_asks_for_a_token(chat_model, browsing, tmp_path):
    (tmp_path / "token").write_text("a-long-secret-of-mine\n")
    with serving(chat_model, "--token-file", tmp_path / "token") as address:
        browsing.open(address)
        browsing.wait("at('ask-token').open")
        assert browsing.run("model === null")
        browsing.run(
            "at('token').value = 'a-long-secret-of-mine'; document.querySelector('#ask-token .primary').click()"
        )
        browsing.wait("model !== null")
        assert not browsing.run("at('ask-token').open")
