// Earlier conversations, kept in this browser (IndexedDB): the newest ones, up to a limit.

import { byId, make, showError } from "./dom.mjs";
import { surplus } from "./turns.mjs";

const MAX_COUNT = 50;
const MAX_BYTES = 200 * 2 ** 20;
const STORE = "conversations";

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

let database = null;

// Runs one request against the store.
async function inStore(mode, ask) {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("blip2", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return settled(ask((await database).transaction(STORE, mode).objectStore(STORE)));
}

let hasComplained = false;

function complain() {
  if (!hasComplained) showError("This browser keeps no history here.");
  hasComplained = true;
}

export async function keepConversation({ id, file, name, turns }) {
  const kept = turns.map(({ question, answer, stopped, failed }) => ({ question, answer, stopped, failed }));
  const conversation = { id, file, name, turns: kept, changed: Date.now(), bytes: file.size };
  try {
    await inStore("readwrite", (store) => store.put(conversation));
    const all = await inStore("readonly", (store) => store.getAll());
    for (const old of surplus(all, MAX_COUNT, MAX_BYTES)) await inStore("readwrite", (store) => store.delete(old));
  } catch {
    complain();
  }
}

let urls = [];

async function list(open) {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
  const all = await inStore("readonly", (store) => store.getAll());
  all.sort((a, b) => b.changed - a.changed);
  byId("history-about").textContent = all.length
    ? `The last ${MAX_COUNT} conversations, in this browser only.`
    : "Nothing yet.";
  byId("clear-history").hidden = !all.length;
  byId("conversations").replaceChildren(...all.map((conversation) => entry(conversation, open)));
}

function entry(conversation, open) {
  const { id, file, name, turns, changed } = conversation;
  const url = URL.createObjectURL(file);
  urls.push(url);
  const said = turns[0]?.answer || name;
  const when = make("small", { className: "faint", textContent: new Date(changed).toLocaleString() });
  const text = make("span", {}, said, make("br"), when);
  const opener = make("button", { type: "button" }, make("img", { src: url, alt: "", loading: "lazy" }), text);
  opener.onclick = () => {
    byId("history").close();
    open(conversation);
  };
  const remove = make("button", { type: "button", textContent: "Delete", ariaLabel: `Delete “${said}”` });
  remove.onclick = async () => {
    await inStore("readwrite", (store) => store.delete(id));
    await list(open);
    byId("history-title").focus();
  };
  return make("li", {}, opener, remove);
}

// `open` is called with the conversation that was chosen.
export function startHistory(open) {
  byId("close-history").onclick = () => byId("history").close();
  byId("open-history").onclick = async () => {
    try {
      await list(open);
      byId("history").showModal();
    } catch {
      complain();
    }
  };
  byId("clear-history").onclick = async () => {
    await inStore("readwrite", (store) => store.clear());
    await list(open);
  };
}
