// A conversation about a picture: its caption, questions and answers, compared texts.

import { chat, match } from "./api.mjs";
import { announce, byId, copy, hideError, make } from "./dom.mjs";
import { closePicture, describePicture, showHeat, showPicture } from "./picture.mjs";
import { before } from "./turns.mjs";
import { sentencesEnd, words } from "./words.mjs";

let abilities = new Set();
let conversation = null;
let writing = null;
let report = () => {};
let onChange = () => {};

// What the model can do, `report` for errors, `onChange` for what is worth keeping.
export function startConversation(handlers) {
  ({ report, onChange } = handlers);
  byId("ask").onsubmit = (event) => {
    event.preventDefault();
    const question = byId("question").value.trim();
    if (!question || writing) return;
    byId("question").value = "";
    write(question);
  };
  byId("describe").onclick = () => write(null);
  byId("stop").onclick = () => writing?.abort();
  byId("match").onsubmit = (event) => {
    event.preventDefault();
    compare(byId("match-text").value.trim());
  };
}

export function setAbilities(capabilities) {
  abilities = new Set(capabilities);
  byId("ask").hidden = byId("turns").hidden = !abilities.has("chat");
  byId("no-answers").hidden = abilities.has("chat");
  byId("match").hidden = !abilities.has("match");
  byId("hint").hidden = !abilities.has("explain_answer");
  byId("no-match").hidden = abilities.has("match");
}

// Opens a picture: a new one is described at once, one of the history has its turns.
export async function openConversation({ id, file, name, turns = [] }) {
  closeConversation();
  const mine = { id: id ?? `${Date.now()}-${Math.random()}`, file, name, turns };
  conversation = mine;
  byId("turns").replaceChildren();
  byId("scores").replaceChildren();
  try {
    const shown = await showPicture(file, name);
    if (conversation !== mine) return;
    Object.assign(mine, shown);
  } catch (error) {
    return report(error);
  }
  for (const turn of turns) finish(turn, begin(turn));
  if (turns.length) describePicture(turns[0].question ? "" : turns[0].answer);
  else if (abilities.has("chat")) await write(null);
}

export function closeConversation() {
  writing?.abort();
  conversation = null;
  closePicture();
}

// Writes the picture's description, or the answer to a question.
async function write(question) {
  const mine = conversation;
  const turn = { question, answer: "" };
  const element = begin(turn);
  const text = element.querySelector(".answer");
  const stop = new AbortController();
  const signal = AbortSignal.any([stop.signal, mine.signal]);
  let announced = 0;
  setWriting(stop);
  hideError();
  text.classList.add("growing");
  try {
    const onText = (more) => {
      turn.answer += more;
      text.textContent = turn.answer;
      const end = sentencesEnd(turn.answer, announced);
      announce(turn.answer.slice(announced, end));
      announced = end;
    };
    await chat(mine.data, mine.turns, question, onText, signal);
  } catch (error) {
    if (!signal.aborted) {
      turn.failed = true;
      report(error);
    }
  }
  if (writing === stop) setWriting(null);
  text.classList.remove("growing");
  if (conversation !== mine) return;
  announce(turn.answer.slice(announced));
  turn.stopped = stop.signal.aborted;
  if (turn.failed && !turn.answer) {
    element.remove();
    if (question && !byId("question").value) byId("question").value = question;
    return;
  }
  finish(turn, element);
  mine.turns.push(turn);
  if (!question) describePicture(turn.answer);
  onChange(mine);
}

function setWriting(stop) {
  writing = stop;
  const buttons = [byId("send"), byId("describe"), byId("stop")];
  const hadFocus = buttons.includes(document.activeElement);
  byId("send").hidden = byId("describe").hidden = Boolean(stop);
  byId("stop").hidden = !stop;
  // The button that was pressed is gone: the focus stays in the form.
  if (hadFocus) byId("question").focus({ preventScroll: true });
}

// The turn's place on the page.
function begin(turn) {
  const asked = turn.question ? [make("p", { className: "asked", textContent: turn.question })] : [];
  const element = make("li", {}, ...asked, make("p", { className: "answer" }));
  byId("turns").append(element);
  element.scrollIntoView({ block: "nearest" });
  return element;
}

// The whole answer, with what can be done with it.
function finish(turn, element) {
  const answer = element.querySelector(".answer");
  const copyButton = make("button", { type: "button", className: "small", textContent: "Copy" });
  copyButton.onclick = async () => {
    try {
      await copy(turn.answer);
      copyButton.textContent = "Copied";
      announce("Copied");
      setTimeout(() => (copyButton.textContent = "Copy"), 2000);
    } catch (error) {
      report(error);
    }
  };
  const tools = make("div", { className: "row" }, copyButton);
  const note = turn.stopped || turn.failed ? "stopped" : turn.answer ? "" : "The model wrote nothing.";
  if (note) tools.append(make("span", { className: "faint", textContent: note }));
  if (turn.answer && abilities.has("explain_answer")) makeExplainable(turn, answer, tools);
  else answer.textContent = turn.answer;
  element.append(tools);
}

// Words can be clicked; the button makes them buttons, for keys and fingers.
function makeExplainable(turn, answer, tools) {
  const { turns } = conversation;
  const about = () =>
    turn.question ? { question: turn.question, history: before(turns, turn) } : { caption: true };
  const show = (tag) => {
    const pieces = words(turn.answer).map((piece) => {
      if (!piece.nth) return piece.text;
      const word = make(tag, { className: "word", textContent: piece.text });
      word.onclick = () => look({ ...about(), text: turn.answer, word: piece.text, occurrence: piece.nth }, word);
      return word;
    });
    answer.replaceChildren(...pieces);
  };
  const toggle = make("button", { type: "button", className: "small", textContent: "Where it looked" });
  toggle.ariaExpanded = "false";
  toggle.onclick = () => {
    const opens = toggle.ariaExpanded === "false";
    toggle.ariaExpanded = String(opens);
    show(opens ? "button" : "span");
    if (opens) look({ ...about(), text: turn.answer }, answer);
  };
  show("span");
  tools.append(toggle);
}

async function look(what, element) {
  try {
    const looking = showHeat(what);
    if (element.matches(".word")) element.classList.add("chosen");
    await looking;
  } catch (error) {
    report(error);
  }
}

// How well a text fits, at the top of the list.
async function compare(text) {
  const mine = conversation;
  if (!text || !mine?.data) return;
  hideError();
  try {
    const score = await match(mine.data, text, mine.signal);
    if (conversation === mine) byId("scores").prepend(scoreRow(text, score));
  } catch (error) {
    if (!mine.signal.aborted) report(error);
  }
}

function scoreRow(text, { itm_probability: probability, itc_similarity: similarity }) {
  const percent = `${(100 * probability).toFixed(1)} %`;
  announce(`${text}: fits with ${percent}`);
  const line = make("div", { className: "row" }, make("span", { textContent: text }), make("strong", { textContent: percent }));
  const meter = make("meter", { value: probability, ariaLabel: `How well “${text}” fits` });
  const under = make("div", { className: "row" });
  under.append(make("span", { className: "faint", textContent: `similarity ${similarity.toFixed(3)}` }));
  if (abilities.has("explain_match")) {
    const button = make("button", { type: "button", className: "small", textContent: "Where it looked" });
    button.ariaLabel = `Where it looked for “${text}”`;
    button.onclick = () => look({ text }, button);
    under.append(button);
  }
  return make("li", {}, line, meter, under);
}
