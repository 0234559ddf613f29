"""Uses the page as a person would, in a headless Chromium, against `blip2 serve` with tiny random models.

    pip install playwright
    npm install axe-core            # optional: accessibility
    python tools/page/browser.py target/debug/blip2 --chromium /usr/bin/chromium \
        --axe node_modules/axe-core/axe.min.js --shots shots

Prints a line for what it tried and exits with 1 at the first that is not as it should be: also at any error in the
browser's console, any request to somewhere else, and any serious or critical finding of axe.
"""

import argparse
import csv
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PICTURES = [ROOT / "assets/pictures" / name for name in ("cat.jpg", "coffee.jpg", "rocket.jpg")]
GOLDEN = ROOT / "crates/blip2/tests/golden"


class Server:
    """A server of its own, on a free port."""

    def __init__(self, binary, model, key=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BLIP2_")}
        if key:
            environment["BLIP2_API_KEY"] = key
        command = [binary, "serve", "--model", GOLDEN / model, "--port", str(self.port)]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, env=environment, stderr=self.log)
        for _ in range(200):
            if self.process.poll() is not None:
                self.log.seek(0)
                raise SystemExit(f"the server ended: {self.log.read()}")
            try:
                urllib.request.urlopen(self.url + "ready").read()
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit("the server does not become ready")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=30)
        self.log.close()


class Visit:
    """A page whose every complaint is a failure."""

    def __init__(self, browser, server, options, **context):
        self.context = browser.new_context(accept_downloads=True, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.url, self.options = server.url, options
        self.complaints, self.expected = [], []
        self.page.on("console", lambda told: told.type in ("error", "warning") and self.complain(told.text))
        self.page.on("pageerror", lambda error: self.complain(str(error)))
        self.page.on("request", self.check_request)
        self.page.goto(server.url)

    def complain(self, text):
        if not any(re.search(pattern, text) for pattern in self.expected):
            self.complaints.append(text)

    def check_request(self, request):
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.complain(f"a request to {request.url}")

    def done(self, what):
        if self.complaints:
            sys.exit(f"FAILED  {what}: {self.complaints}")
        print(f"ok      {what}", flush=True)

    def shot(self, name, full=False):
        if self.options.shots:
            self.page.screenshot(path=f"{self.options.shots}/{name}.png", full_page=full)

    def axe(self, what):
        """No serious finding of axe."""
        if not self.options.axe:
            return
        self.page.evaluate(Path(self.options.axe).read_text())
        found = self.page.evaluate("axe.run()")
        serious = [
            (one["impact"], one["id"], [node["html"] for node in one["nodes"]])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        if serious or not found["passes"]:
            sys.exit(f"FAILED  axe, {what}: {serious}")
        others = [one["id"] for one in found["violations"]]
        print(f"ok      axe, {what}: {len(found['passes'])} rules pass; not serious: {others or 'nothing'}", flush=True)

    def fits_width(self):
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def answers(page):
    """The texts of the answers that are complete."""
    expect(page.locator("#stop")).to_be_hidden()
    return page.locator("#turns .answer").all_text_contents()


def ask(page, question):
    n = len(answers(page))
    page.get_by_label("Question about the picture").fill(question)
    page.keyboard.press("Enter")
    expect(page.locator("#turns > li")).to_have_count(n + 1)
    return answers(page)[-1]


def talk(browser, server, options):
    visit = Visit(browser, server, options, viewport={"width": 1280, "height": 800})
    page = visit.page
    expect(page.locator("#model")).not_to_be_empty()
    visit.axe("start")
    visit.shot("1-start")
    sent = []
    page.on("request", lambda request: request.post_data and sent.append((request.url, json.loads(request.post_data))))
    set_settings(page, max_tokens="12")
    page.get_by_label("Choose pictures").set_input_files(PICTURES[0])
    expect(page.locator("#turns .answer")).to_have_count(1)
    [caption] = answers(page)
    assert caption.strip(), "a caption"
    expect(page.locator("#picture")).to_have_attribute("alt", f"cat.jpg: {caption}")
    assert page.evaluate("document.querySelector('#picture').naturalWidth") > 0
    visit.done("a chosen picture is described as it streams")

    first = ask(page, "what is this?")
    second = ask(page, "<b>why?</b>")
    assert first.strip() and second.strip()
    chats = [body for url, body in sent if url.endswith("chat/completions")]
    assert [len(body["messages"]) for body in chats] == [1, 1, 3] and all(body["max_tokens"] == 12 for body in chats)
    assert page.locator("#turns b").count() == 0, "text stays text"
    page.get_by_role("button", name="Describe").click()
    expect(page.locator("#turns > li")).to_have_count(4)
    assert answers(page)[-1] == caption, "described again, the same without a temperature"
    visit.done("questions over several turns")

    page.locator("#turns .answer").first.locator("span.word").first.click()
    expect(page.locator("#heat-of")).to_have_text(re.compile("^for “"))
    expect(page.locator("#heat")).to_be_visible()
    warmth = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((_, i) => i % 4 == 3).some(a => a > 100)"
    assert page.locator("#heat").evaluate(warmth), "somewhere it glows"
    explained = [body for url, body in sent if url.endswith("explain")][-1]
    assert explained["caption"] and explained["text"] == caption and explained["word"] in caption
    visit.shot("2-word")
    page.get_by_label("Where it looked").first.uncheck()
    expect(page.locator("#heat")).to_be_hidden()
    visit.done("a word of the caption has a heat map, which can be hidden")

    # By keys alone: the last answer as buttons, one of its words.
    toggle = page.get_by_role("button", name="Where it looked").last
    toggle.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#heat-of")).to_have_text(re.compile("^for “"))
    page.locator("#turns > li").last.locator("button.word").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".word.chosen")).to_have_count(1)
    expect(page.locator("#heat-of")).to_have_text(re.compile("^for “"))
    visit.axe("conversation")
    visit.shot("3-keys")
    visit.done("words by keyboard")

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").first.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == caption
    visit.done("copy")

    set_settings(page, max_tokens="1000")
    visit.expected.append("400")
    page.get_by_label("Question about the picture").fill("who?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#alert")).to_contain_text("max_tokens is 1000, this server writes 1 to 512")
    expect(page.locator("#question")).to_have_value("who?")
    visit.shot("4-error")
    visit.axe("error")
    visit.done("an error in the server's words, and the question is not lost")

    # A stopped answer: the request is held back, since tiny models are done before anybody can stop them.
    held = []
    set_settings(page)
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("stopped")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()
    assert len(held) == 1
    held[0].abort()
    page.unroute("**/v1/chat/completions")
    visit.done("stop")

    page.reload()
    page.get_by_role("button", name="History").click()
    expect(page.locator("#conversations li")).to_have_count(1)
    visit.axe("history")
    visit.shot("5-history")
    page.locator("#conversations button").first.click()
    expect(page.locator("#turns .answer").first).to_have_text(caption)
    # Another question would not fit the tiny model's context.
    set_settings(page, max_tokens="12")
    page.get_by_role("button", name="Describe").click()
    expect(page.locator("#turns > li")).to_have_count(6)
    assert answers(page)[-1] == caption, "a conversation of the history goes on"
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="Clear the history").click()
    expect(page.locator("#history-about")).to_have_text("Nothing yet.")
    page.keyboard.press("Escape")
    visit.done("history")
    visit.context.close()


def set_settings(page, **values):
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#settings")).to_be_hidden()


def table(browser, server, options):
    visit = Visit(browser, server, options, viewport={"width": 1280, "height": 800})
    page = visit.page
    expect(page.locator("#model")).not_to_be_empty()
    odd = {"name": '=cmd "x", y.jpg', "mimeType": "image/jpeg", "buffer": PICTURES[0].read_bytes()}
    broken = {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"}
    visit.expected.append("400")
    files = [{"name": p.name, "mimeType": "image/jpeg", "buffer": p.read_bytes()} for p in PICTURES]
    page.get_by_label("Choose pictures").set_input_files([*files, odd, broken])
    expect(page.locator("#batch-state")).to_have_text("5 of 5, 1 failed")
    expect(page.locator("#rows .wrong")).to_have_count(1)
    visit.axe("table")
    visit.shot("6-table")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(), newline="")))
    assert rows[0] == ["name", "caption", "error"] and len(rows) == 6, rows
    assert [row[0] for row in rows[1:]] == ["cat.jpg", "coffee.jpg", "rocket.jpg", """'=cmd "x", y.jpg""", "broken.jpg"]
    assert all(row[1] for row in rows[1:5]) and rows[5][2], rows
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSONL").click()
    lines = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert lines[3]["name"] == odd["name"] and [line["caption"] for line in lines[:3]] == [row[1] for row in rows[1:4]]
    page.get_by_role("button", name="coffee.jpg").click()
    expect(page.locator("#turns .answer")).to_have_text(lines[1]["caption"])
    page.get_by_role("button", name="Table").click()
    expect(page.locator("#rows tr")).to_have_count(5)
    visit.done("several pictures become a table, as CSV and JSON lines")
    visit.context.close()


def match(browser, server, options):
    visit = Visit(browser, server, options, viewport={"width": 1280, "height": 800}, color_scheme="dark")
    page = visit.page
    expect(page.locator("#abilities")).to_contain_text("how well a text fits")
    page.get_by_label("Choose pictures").set_input_files(PICTURES[0])
    expect(page.locator("#no-answers")).to_be_visible()
    text = page.get_by_label("How well does a text fit?")
    for said in ("a cat", "two dogs"):
        text.fill(said)
        text.press("Enter")
        expect(page.locator("#scores li").first).to_contain_text(said)
    expect(page.locator("#scores meter")).to_have_count(2)
    page.get_by_role("button", name="Where it looked for “a cat”").click()
    expect(page.locator("#heat-of")).to_have_text("for “a cat”")
    expect(page.locator("#heat")).to_be_visible()
    visit.axe("match, dark")
    visit.shot("7-match-dark")
    visit.done("texts are compared and explained")
    page.get_by_role("button", name="New picture").click()
    page.get_by_label("Choose pictures").set_input_files(PICTURES)
    page.get_by_label("Compare every picture").fill("a cat")
    page.get_by_label("Compare every picture").press("Enter")
    expect(page.locator("#batch-state")).to_have_text("3 of 3")
    visit.shot("8-match-table-dark")
    visit.done("a table of how well a text fits")
    visit.context.close()


def phone(browser, server, options):
    visit = Visit(browser, server, options, viewport={"width": 320, "height": 640}, reduced_motion="reduce")
    page = visit.page
    expect(page.locator("#model")).not_to_be_empty()
    visit.fits_width()
    visit.shot("9-phone-start")
    set_settings(page, max_tokens="12")
    page.get_by_label("Choose pictures").set_input_files(PICTURES[0])
    expect(page.locator("#turns .answer")).to_have_count(1)
    ask(page, "what is this?")
    page.get_by_role("button", name="Where it looked").first.click()
    expect(page.locator("#heat")).to_be_visible()
    visit.fits_width()
    visit.axe("phone")
    visit.shot("10-phone-talk", full=True)
    theme = page.locator("#theme")
    theme.click()
    theme.click()
    expect(theme).to_have_text("Theme: dark")
    visit.shot("11-phone-dark")
    visit.axe("phone, dark")
    page.get_by_role("button", name="Settings").click()
    visit.axe("settings")
    visit.shot("12-phone-settings")
    page.keyboard.press("Escape")
    page.reload()
    expect(theme).to_have_text("Theme: dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    visit.done("phone width, and the theme is kept")
    page.get_by_label("Choose pictures").set_input_files(PICTURES)
    expect(page.locator("#batch-state")).to_have_text("3 of 3")
    visit.fits_width()
    scroll = page.locator("#batch .scroll")
    assert scroll.evaluate("at => at.scrollWidth <= at.clientWidth"), "the table fits"
    widths = page.locator("#rows td:nth-child(3)").evaluate_all("cells => cells.map((at) => at.clientWidth)")
    assert all(width > 180 for width in widths), f"captions have room: {widths}"
    assert scroll.get_by_role("columnheader", name="Caption").count() == 1, "columns have names"
    visit.axe("phone, table")
    visit.shot("13-phone-table", full=True)
    visit.done("a table at phone width")
    visit.context.close()


def keys_only(browser, server, options):
    """From nothing to an answer without a mouse; every stop of the Tab key can be seen."""
    visit = Visit(browser, server, options, viewport={"width": 1280, "height": 800})
    page = visit.page
    expect(page.locator("#model")).not_to_be_empty()
    stops = []
    for _ in range(12):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
              const at = document.activeElement;
              const shown = at.id === "files" ? at.nextElementSibling : at;
              return [at.id || at.tagName, at === document.body || getComputedStyle(shown).outlineStyle !== "none"];
            }"""
        )
        stops.append(stop)
    assert all(seen for _, seen in stops), stops
    names = [name for name, _ in stops]
    assert {"open-history", "open-settings", "theme", "files"} <= set(names), names
    assert names.count("files") < 4, "the focus goes round"
    # Paste, as Ctrl+V does: the event is made here, since the clipboard of a headless browser takes only PNG.
    page.evaluate(
        """async (bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "pasted.jpg", {type: "image/jpeg"}));
          window.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
        }""",
        list(PICTURES[1].read_bytes()),
    )
    expect(page.locator("#picture-name")).to_have_text("pasted.jpg")
    expect(page.locator("#question")).to_be_focused()
    expect(page.locator("#turns .answer:not(.growing)")).to_have_count(1)
    page.keyboard.type("who?")
    page.keyboard.press("Enter")
    expect(page.locator("#turns > li")).to_have_count(2)
    answers(page)
    visit.done("keyboard only, pasted picture")
    drop = """async (bytes) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "dropped.jpg", {type: "image/jpeg"}));
      for (const kind of ["dragover", "drop"])
        document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(drop, list(PICTURES[2].read_bytes()))
    expect(page.locator("#picture-name")).to_have_text("dropped.jpg")
    expect(page.locator("#turns .answer:not(.growing)")).to_have_count(1)
    visit.done("dropped picture")
    visit.context.close()


def with_key(browser, server, options):
    visit = Visit(browser, server, options, viewport={"width": 1280, "height": 800})
    page = visit.page
    visit.expected.append("401")
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#settings-wrong")).to_contain_text("a key of this server is needed")
    page.locator("#key").fill("secret-key")
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#model")).not_to_be_empty()
    page.reload()
    expect(page.locator("#model")).not_to_be_empty()
    visit.done("a server with a key asks for it once")
    page.goto(visit.url + "docs")
    expect(page.get_by_role("heading", name="POST /v1/explain")).to_be_visible()
    visit.axe("docs")
    visit.done("the interface's description")
    visit.context.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary")
    parser.add_argument("--chromium", help="another browser than playwright's own")
    parser.add_argument("--axe", help="axe.min.js")
    parser.add_argument("--shots", help="a folder for screenshots")
    options = parser.parse_args()
    if options.shots:
        Path(options.shots).mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        with Server(options.binary, "blip2_opt") as server:
            for part in (talk, table, phone, keys_only):
                part(browser, server, options)
        with Server(options.binary, "blip2_itm") as server:
            match(browser, server, options)
        with Server(options.binary, "blip2_opt", key="secret-key") as server:
            with_key(browser, server, options)
        browser.close()


if __name__ == "__main__":
    main()
