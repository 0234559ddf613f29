// The picture that is talked about, and the heat map over it.

import { explain } from "./api.mjs";
import { announce, byId, hideError } from "./dom.mjs";
import { draw } from "./heat.mjs";

let picture = null;
let asked = null;

// A file as a `data:` URL.
export const dataUrl = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name || "The picture"} cannot be read.`));
    reader.readAsDataURL(file);
  });

// Shows a file; what is asked about it before another one is shown shares `signal`.
export async function showPicture(file, name) {
  closePicture();
  const mine = { name, url: URL.createObjectURL(file), leaving: new AbortController() };
  picture = mine;
  const image = byId("picture");
  byId("picture-name").textContent = name;
  image.onerror = () => (byId("picture-name").textContent = `${name} (this browser cannot show it)`);
  image.src = mine.url;
  describePicture("");
  mine.data = await dataUrl(file);
  return { data: mine.data, signal: mine.leaving.signal };
}

// What the picture shows, for those who do not see it.
export function describePicture(caption) {
  byId("picture").alt = caption ? `${picture.name}: ${caption}` : picture.name;
}

export function closePicture() {
  hideHeat();
  if (!picture) return;
  picture.leaving.abort();
  URL.revokeObjectURL(picture.url);
  picture = null;
}

// Asks where the model looked, and shows it; `what` are the fields of /v1/explain.
export async function showHeat(what) {
  hideHeat();
  hideError();
  const mine = new AbortController();
  asked = mine;
  const signal = AbortSignal.any([mine.signal, picture.leaving.signal]);
  const of = `“${what.word ?? what.text}”`;
  byId("heat-line").hidden = false;
  byId("heat-of").textContent = `${of}: looking…`;
  try {
    const map = await explain(picture.data, what, signal);
    draw(byId("heat"), map);
    byId("heat-of").textContent = `for ${of}`;
    byId("heat-shown").checked = true;
    byId("heat").hidden = false;
    announce(`${of}: the model looked mostly ${place(map)}.`);
  } catch (error) {
    if (asked === mine) hideHeat();
    if (!signal.aborted) throw error;
  }
}

export function hideHeat() {
  asked?.abort();
  byId("heat").hidden = true;
  byId("heat-line").hidden = true;
  document.querySelectorAll(".word.chosen").forEach((word) => word.classList.remove("chosen"));
}

// Where the warmest place is, in words.
function place({ side, values }) {
  const at = values.indexOf(Math.max(...values));
  const third = (i) => Math.floor((3 * (i + 0.5)) / side);
  const [row, column] = [third(Math.floor(at / side)), third(at % side)];
  if (row === 1 && column === 1) return "at the middle";
  return `at the ${["top", "", "bottom"][row]} ${["left", "", "right"][column]}`.replace(/\s+/g, " ").trimEnd();
}

export function startPicture() {
  byId("heat-shown").onchange = (event) => (byId("heat").hidden = !event.target.checked);
}
