// Several pictures: a table that is filled one row after the other, and becomes a file.

import { caption, match } from "./api.mjs";
import { csv, jsonLines } from "./csv.mjs";
import { announce, byId, download, make } from "./dom.mjs";
import { dataUrl } from "./picture.mjs";

let abilities = new Set();
let rows = [];
let running = null;
// The text that every picture is compared with.
let compared = "";
let open = () => {};

export function setTableAbilities(capabilities) {
  abilities = new Set(capabilities);
  byId("compare-all").hidden = !abilities.has("match");
  byId("caption-head").hidden = !abilities.has("caption");
}

export const hasTable = () => rows.length > 0;

// `onOpen` is called with the picture that was chosen in the table.
export function startTable(onOpen) {
  open = onOpen;
  byId("batch-stop").onclick = () => running?.abort();
  byId("batch-go").onclick = () => {
    for (const row of rows) row.wrong = "";
    run();
  };
  byId("compare-all").onsubmit = (event) => {
    event.preventDefault();
    running?.abort();
    compared = byId("compare-text").value.trim();
    byId("fits-head").hidden = !compared;
    for (const row of rows) {
      row.fits = null;
      show(row);
    }
    run();
  };
  const base = () => `captions-${new Date().toISOString().slice(0, 10)}`;
  byId("csv").onclick = () => {
    const records = rows.map(record);
    const lines = [Object.keys(records[0]), ...records.map(Object.values)];
    download(`${base()}.csv`, "text/csv", csv(lines));
  };
  byId("jsonl").onclick = () => download(`${base()}.jsonl`, "application/jsonl", jsonLines(rows.map(record)));
}

// What a file has of a row.
function record(row) {
  const told = { name: row.file.name };
  if (abilities.has("caption")) told.caption = row.caption;
  if (compared) {
    const { itm_probability = null, itc_similarity = null } = row.fits ?? {};
    Object.assign(told, { text: compared, itm_probability, itc_similarity });
  }
  return { ...told, error: row.wrong };
}

// A new table.
export function openTable(files) {
  closeTable();
  rows = files.map((file) => ({ file, url: URL.createObjectURL(file), caption: null, fits: null, wrong: "" }));
  byId("fits-head").hidden = !compared;
  byId("rows").replaceChildren(...rows.map(makeRow));
  run();
}

function closeTable() {
  running?.abort();
  rows.forEach((row) => URL.revokeObjectURL(row.url));
  rows = [];
}

function makeRow(row) {
  const opener = make("button", { type: "button", className: "small", textContent: row.file.name });
  opener.onclick = () => open(row.file, row.caption);
  row.cells = {
    caption: make("td", { hidden: !abilities.has("caption") }),
    fits: make("td", { className: "fits" }),
    state: make("td"),
  };
  const image = make("img", { src: row.url, alt: "", loading: "lazy", decoding: "async" });
  image.onerror = () => (image.hidden = true);
  show(row);
  return make("tr", {}, make("td", {}, image), make("td", {}, opener), ...Object.values(row.cells));
}

const isDone = (row) => (row.caption !== null || !abilities.has("caption")) && (row.fits !== null || !compared);

function show(row, isNow = false) {
  const { caption, fits, state } = row.cells;
  caption.textContent = row.caption ?? "";
  fits.hidden = !compared;
  fits.textContent = row.fits ? `${(100 * row.fits.itm_probability).toFixed(1)} %` : "";
  state.textContent = row.wrong || (isNow ? "looking…" : isDone(row) ? "done" : "waiting");
  state.className = row.wrong ? "wrong" : "faint";
}

function progress(text) {
  const n = rows.filter((row) => isDone(row) || row.wrong).length;
  byId("batch-progress").max = rows.length;
  byId("batch-progress").value = n;
  byId("batch-state").textContent = `${n} of ${rows.length}${text}`;
}

// Fills what is missing, until all is there or somebody stops it.
async function run() {
  const mine = new AbortController();
  running = mine;
  byId("batch-stop").hidden = false;
  byId("batch-go").hidden = true;
  for (const row of rows) {
    if (isDone(row) || row.wrong) continue;
    if (mine.signal.aborted) break;
    show(row, true);
    progress("");
    try {
      await fill(row, mine.signal);
    } catch (error) {
      if (!mine.signal.aborted) row.wrong = error.message;
    }
    show(row);
  }
  if (running !== mine) return;
  const failed = rows.filter((row) => row.wrong).length;
  progress(mine.signal.aborted ? ", stopped" : failed ? `, ${failed} failed` : "");
  announce(`The table is ${mine.signal.aborted ? "stopped" : "complete"}: ${byId("batch-state").textContent}`);
  byId("batch-stop").hidden = true;
  byId("batch-go").hidden = rows.every(isDone);
  byId("batch-go").textContent = mine.signal.aborted ? "Go on" : "Try again";
  running = null;
}

async function fill(row, signal) {
  const image = await dataUrl(row.file);
  if (abilities.has("caption") && row.caption === null) {
    row.caption = await patiently(() => caption(image, signal), signal);
  }
  if (compared && !row.fits) row.fits = await patiently(() => match(image, compared, signal), signal);
}

// A server that is full says when to come again.
async function patiently(ask, signal) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await ask();
    } catch (error) {
      if (error.status !== 429 || attempt === 10) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(1, error.retryAfter)));
      signal.throwIfAborted();
    }
  }
}
