// What the page computes without a browser: node --test tools/page/pure.test.mjs
import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";

const folder = new URL("../../crates/blip2-server/src/static/", import.meta.url);
const { csv, jsonLines } = await import(new URL("csv.mjs", folder));
const { EventReader } = await import(new URL("sse.mjs", folder));
const { sentencesEnd, words } = await import(new URL("words.mjs", folder));
const { before, messages, surplus } = await import(new URL("turns.mjs", folder));
const { colours, glow } = await import(new URL("heat.mjs", folder));

test("fields of a CSV are quoted where they need it", () => {
  assert.equal(csv([["a", "b c"], ['say "x"', "1,2"], ["two\nlines", null]]), 'a,b c\r\n"say ""x""","1,2"\r\n"two\nlines",\r\n');
  assert.equal(csv([["é", "日本"]]), "é,日本\r\n");
});

test("no text in a CSV is a formula", () => {
  for (const text of ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1"]) {
    const line = csv([[text]]);
    assert.ok(line.startsWith(`"'`), JSON.stringify(line));
  }
  assert.equal(csv([["a=1", -0.25]]), "a=1,-0.25\r\n", "numbers stay numbers");
});

test("a line of JSON is a row", () => {
  const rows = [{ name: "a", caption: 'x "y"\n' }, { name: "b", caption: null }];
  const lines = jsonLines(rows).trimEnd().split("\n");
  assert.deepEqual(lines.map((line) => JSON.parse(line)), rows);
});

test("events are the same however they are cut", () => {
  const stream = 'data: {"a": 1}\r\n\r\n: still here\n\ndata:two\ndata: lines\n\nevent: x\rdata: é日\r\rdata: [DONE]\n\n';
  const expected = ['{"a": 1}', "two\nlines", "é日", "[DONE]"];
  for (let size = 1; size <= stream.length; size++) {
    const reader = new EventReader();
    const found = [];
    for (let at = 0; at < stream.length; at += size) found.push(...reader.push(stream.slice(at, at + size)));
    assert.deepEqual(found, expected, `pieces of ${size}`);
  }
  assert.deepEqual(new EventReader().push("data: half"), []);
});

test("an answer is its words and what is between them", () => {
  const text = "  A cat, a bat; the café's 2nd cat.";
  const pieces = words(text);
  assert.equal(pieces.map((piece) => piece.text).join(""), text);
  const found = pieces.filter((piece) => piece.nth).map((piece) => [piece.text, piece.nth]);
  assert.deepEqual(found, [["A", 1], ["cat", 1], ["a", 2], ["bat", 1], ["the", 1], ["café's", 1], ["2nd", 1], ["cat", 2]]);
  const [, second] = words("don't don").filter((piece) => piece.nth);
  assert.deepEqual(second, { text: "don", nth: 2 }, "the server finds the first in don't");
  assert.deepEqual(words(""), []);
});

test("what can be read out ends with a sentence", () => {
  const text = "A cat. It sleeps! And 3.5 more";
  assert.equal(text.slice(0, sentencesEnd(text, 0)), "A cat. It sleeps!");
  assert.equal(sentencesEnd(text, 17), 17);
  assert.equal(sentencesEnd("no end yet", 0), 0);
});

test("the picture goes with the first question", () => {
  const picture = { type: "image_url", image_url: { url: "data:x" } };
  assert.deepEqual(messages("data:x", [], null), [{ role: "user", content: [picture] }]);
  const turns = [
    { question: null, answer: "a cat" },
    { question: "Who?", answer: "Tom" },
    { question: "Stopped?", answer: "" },
  ];
  assert.deepEqual(messages("data:x", turns, null), messages("data:x", [], null), "a description begins anew");
  const why = { question: "Why?", answer: "Since." };
  assert.deepEqual(before([...turns, why], why), [{ question: "Who?", answer: "Tom" }]);
  assert.deepEqual(messages("data:x", turns, "Why?"), [
    { role: "user", content: [picture, { type: "text", text: "Who?" }] },
    { role: "assistant", content: "Tom" },
    { role: "user", content: [{ type: "text", text: "Why?" }] },
  ]);
});

test("the oldest conversations go first", () => {
  const kept = [1, 2, 3, 4].map((i) => ({ id: `c${i}`, changed: i, bytes: 10 }));
  assert.deepEqual(surplus(kept, 4, 100), []);
  assert.deepEqual(surplus(kept, 2, 100), ["c2", "c1"]);
  assert.deepEqual(surplus(kept, 9, 35), ["c1"]);
});

test("a heat map grows lighter and is transparent at nothing", () => {
  const light = (value) => glow(value).reduce((sum, x) => sum + x);
  for (let value = 0.1; value <= 1; value += 0.1) assert.ok(light(value) > light(value - 0.1));
  assert.deepEqual([...colours([0, 1])], [20, 20, 120, 0, 255, 240, 90, 178]);
});

test("text never becomes markup or code, and no address leads elsewhere", () => {
  for (const name of readdirSync(folder).filter((name) => /\.m?js$/.test(name))) {
    const code = readFileSync(new URL(name, folder), "utf8");
    assert.doesNotMatch(code, /innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|https?:/, name);
  }
});
