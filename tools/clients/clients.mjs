// The official clients of OpenAI and Ollama for Node, unchanged, against a server.
//
// node clients.mjs [http://127.0.0.1:8080]
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { Ollama } from "ollama";
import OpenAI from "openai";

const url = process.argv[2] ?? "http://127.0.0.1:8080";
const apiKey = process.env.BLIP2_API_KEY ?? "none";
const picture = readFileSync(new URL("../../assets/pictures/cat.jpg", import.meta.url));
const base64 = picture.toString("base64");

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const model = (await openai.models.list()).data[0].id;
const messages = [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: `data:image/jpeg;base64,${base64}` } },
      { type: "text", text: "What is this?" },
    ],
  },
];
const request = { model, messages, max_tokens: 12 };

const plain = await openai.chat.completions.create(request);
const text = plain.choices[0].message.content;
console.log("ok      openai plain", JSON.stringify(text));

let streamed = "";
for await (const chunk of await openai.chat.completions.create({ ...request, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, text);
console.log("ok      openai streamed");

await assert.rejects(openai.chat.completions.create({ ...request, model: "gpt-4o" }), (error) => {
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
  assert.ok(error.requestID);
  return true;
});
await assert.rejects(openai.chat.completions.create({ ...request, messages: [] }), OpenAI.BadRequestError);
console.log("ok      openai errors");

// A full queue: with retries every one of many is answered in the end.
const patient = openai.withOptions({ maxRetries: 30 });
const many = await Promise.all(Array.from({ length: 100 }, () => patient.chat.completions.create(request)));
assert.ok(many.every((answer) => answer.choices[0].message.content === text));
console.log("ok      openai, 100 at once with retries");

const long = { ...request, max_tokens: 400, min_tokens: 400, stream: true };
const stream = await openai.chat.completions.create(long);
for await (const _ of stream) {
  stream.controller.abort();
  break;
}
console.log("ok      openai abort");

const ollama = new Ollama({ host: url, headers: { authorization: `Bearer ${apiKey}` } });
assert.equal((await ollama.list()).models[0].name, model);
assert.ok((await ollama.show({ model })).capabilities.includes("vision"));
const options = { num_predict: 12, temperature: 0 };
const said = [{ role: "user", content: "What is this?", images: [base64] }];
const chat = await ollama.chat({ model, messages: said, options });
assert.equal(chat.message.content, text);
console.log("ok      ollama chat");
let lines = "";
for await (const part of await ollama.chat({ model, messages: said, options, stream: true })) {
  lines += part.message.content;
}
assert.equal(lines, text);
console.log("ok      ollama chat streamed");
const generated = await ollama.generate({ model, prompt: "What is this?", images: [new Uint8Array(picture)], options });
assert.equal(generated.response, text);
console.log("ok      ollama generate");
const { capabilities } = await ollama.show({ model });
if (capabilities.includes("embedding")) {
  const { embeddings } = await ollama.embed({ model, input: ["a cat", "a dog"] });
  const { data } = await openai.embeddings.create({ model, input: ["a cat", "a dog"] });
  // OpenAI's client asks for base64 by itself and gives numbers.
  assert.deepEqual(data.map((row) => [...row.embedding].map(Math.fround)), embeddings.map((row) => row.map(Math.fround)));
  console.log("ok      embeddings, the same through both");
}
await assert.rejects(ollama.chat({ model: "llava", messages: said }), /there is no model/);
console.log("ok      ollama errors");
const aborted = await ollama.chat({ model, messages: said, options: { num_predict: 400 }, stream: true });
aborted.abort();
await assert.rejects(async () => {
  for await (const _ of aborted);
}, /aborted/);
console.log("ok      ollama abort");
console.log("all as expected");
