// The server, and its errors in its own words. Addresses are relative: nothing goes anywhere else, the key least of all.

import { generation, key } from "./settings.mjs";
import { EventReader } from "./sse.mjs";
import { messages } from "./turns.mjs";

export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function send(path, body, signal) {
  const headers = {};
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (body) headers["content-type"] = "application/json";
  const request = {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal,
    mode: "same-origin",
    credentials: "omit",
    redirect: "error",
  };
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The server cannot be reached: is it running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `The server refused with the status ${response.status}.`;
  throw new ServerError(message, response.status, Number(response.headers.get("retry-after")) || 0);
}

const post = async (path, body, signal) => (await send(path, body, signal)).json();

export const models = async () => (await (await send("v1/models")).json()).data;

// Describes a picture, or answers a question after `turns`; `onText` hears what is new.
export async function chat(image, turns, question, onText, signal) {
  const body = { messages: messages(image, turns, question), stream: true, ...generation() };
  const response = await send("v1/chat/completions", body, signal);
  const events = new EventReader();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError("The answer ended early.");
      for (const data of events.push(value)) {
        if (data === "[DONE]") return;
        const told = JSON.parse(data);
        if (told.error) throw new ServerError(told.error.message);
        onText(told.choices[0]?.delta.content ?? "");
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
    throw new ServerError("The answer broke off: is the server still running?");
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const caption = async (image, signal) =>
  (await post("v1/caption", { image, ...generation() }, signal)).captions[0].text;

export const match = async (image, text, signal) => (await post("v1/match", { image, texts: [text] }, signal)).scores[0];

export const explain = (image, what, signal) => post("v1/explain", { image, ...what }, signal);
