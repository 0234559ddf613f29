// The settings drawer. What is set is kept in the browser.

import { byId, showError } from "./dom.mjs";

const NUMBERS = ["num_beams", "max_tokens", "temperature", "seed"];
const PLACE = "blip2.settings";

let settings = read();

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(PLACE));
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

function keep(changed) {
  settings = changed;
  try {
    localStorage.setItem(PLACE, JSON.stringify(settings));
  } catch {
    showError("This browser keeps no settings here: they hold until the page is closed.");
  }
}

// The fields of a request that say how to write.
export const generation = () =>
  Object.fromEntries(NUMBERS.filter((name) => Number.isFinite(settings[name])).map((name) => [name, settings[name]]));

export const key = () => settings.key ?? "";

// `wrong` is what made somebody open them.
export function openSettings(focused = "num_beams", wrong = "") {
  byId("settings-wrong").textContent = wrong;
  for (const name of NUMBERS) byId(name).value = settings[name] ?? "";
  byId("key").value = key();
  byId("settings").showModal();
  byId(focused).focus();
}

// `onKey` is called when the key has changed.
export function startSettings(onKey) {
  byId("close-settings").onclick = () => byId("settings").close();
  byId("open-settings").onclick = () => openSettings();
  byId("forget-settings").onclick = () => byId("settings-form").querySelectorAll("input").forEach((input) => (input.value = ""));
  byId("settings-form").onsubmit = () => {
    const before = key();
    const numbers = NUMBERS.map((name) => [name, byId(name).valueAsNumber]).filter(([, value]) => Number.isFinite(value));
    const newKey = byId("key").value.trim();
    keep({ ...Object.fromEntries(numbers), ...(newKey && { key: newKey }) });
    if (newKey !== before) onKey();
  };
}
