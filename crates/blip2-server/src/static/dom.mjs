// The few things that every part of the page does with the document. Text becomes text here, never markup.

export const byId = (id) => document.getElementById(id);

// An element with properties (`className`, `textContent`, `onclick`, …) and children.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Says something to a screen reader when it has time.
export function announce(text) {
  const log = byId("announcements");
  if (text.trim()) log.append(make("p", { textContent: text }));
  while (log.children.length > 5) log.firstElementChild.remove();
}

export function showError(message) {
  const close = make("button", { type: "button", className: "small", textContent: "Close", onclick: hideError });
  byId("alert").replaceChildren(make("p", { textContent: message }), close);
}

export function hideError() {
  byId("alert").replaceChildren();
}

// Without the clipboard's own interface, which browsers give to safe addresses only, as one copies by hand.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = make("textarea", { value: text });
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  if (!isCopied) throw new Error("the browser does not copy");
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
