// The page: which part of it is shown, and how pictures come to it.

import { models } from "./api.mjs";
import { closeConversation, openConversation, setAbilities, startConversation } from "./conversation.mjs";
import { byId, hideError, showError } from "./dom.mjs";
import { keepConversation, startHistory } from "./history.mjs";
import { startPicture } from "./picture.mjs";
import { openSettings, startSettings } from "./settings.mjs";
import { hasTable, openTable, setTableAbilities, startTable } from "./table.mjs";

let isReady = false;
let waiting = [];

function report(error) {
  if (error.status === 401) openSettings("key", error.message);
  else showError(error.message);
}

// "start", "talk" or "batch".
function show(view) {
  for (const id of ["start", "talk", "batch"]) byId(id).hidden = id !== view;
  byId("to-start").hidden = view === "start";
  byId("to-table").hidden = view === "batch" || !hasTable();
  if (view !== "talk") closeConversation();
  const focused = { start: "start-title", talk: byId("ask").hidden ? "match-text" : "question", batch: "batch-title" };
  byId(focused[view]).focus({ preventScroll: true });
  scrollTo(0, 0);
}

function talk(conversation) {
  show("talk");
  openConversation(conversation);
}

// Files from wherever: one is talked about, several become a table.
function take(files) {
  // What the browser does not know the type of may still be a picture to the server.
  const pictures = [...files].filter((file) => !file.type || file.type.startsWith("image/"));
  if (!pictures.length) return files.length ? showError("That is no picture.") : undefined;
  if (!isReady) {
    waiting = pictures;
    return connect();
  }
  hideError();
  if (pictures.length === 1) return talk({ file: pictures[0], name: pictures[0].name });
  show("batch");
  openTable(pictures);
}

// Asks what the model can do.
async function connect() {
  let model;
  try {
    [model] = await models();
  } catch (error) {
    return report(error);
  }
  isReady = true;
  hideError();
  byId("model").textContent = model.id;
  setAbilities(model.capabilities);
  setTableAbilities(model.capabilities);
  const [writes, compares] = ["chat", "match"].map((what) => model.capabilities.includes(what));
  const does = [writes && "describes pictures and answers questions", compares && "tells how well a text fits"];
  byId("abilities").textContent = `This server's model ${does.filter(Boolean).join(", and ")}.`;
  take(waiting.splice(0));
}

function startTheme() {
  const themes = { "": "automatic", light: "light", dark: "dark" };
  const root = document.documentElement;
  const label = () => (byId("theme").textContent = `Theme: ${themes[root.dataset.theme ?? ""] ?? "automatic"}`);
  byId("theme").onclick = () => {
    const names = Object.keys(themes);
    const theme = names[(names.indexOf(root.dataset.theme ?? "") + 1) % names.length];
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    label();
    try {
      localStorage.setItem("blip2.theme", theme);
    } catch {
      showError("This browser does not keep the theme.");
    }
  };
  label();
}

function startFiles() {
  byId("files").onchange = (event) => {
    take(event.target.files);
    event.target.value = "";
  };
  addEventListener("paste", (event) => event.clipboardData.files.length && take(event.clipboardData.files));
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dragged");
  });
  addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dragged"));
  addEventListener("drop", (event) => {
    document.body.classList.remove("dragged");
    if (!hasFiles(event)) return;
    event.preventDefault();
    take(event.dataTransfer.files);
  });
}

startTheme();
startFiles();
startPicture();
startSettings(connect);
startHistory(talk);
startTable((file, caption) => {
  const turns = caption === null ? [] : [{ question: null, answer: caption }];
  talk({ file, name: file.name, turns });
});
startConversation({ report, onChange: keepConversation });
byId("to-start").onclick = () => show("start");
byId("to-table").onclick = () => show("batch");
connect();
