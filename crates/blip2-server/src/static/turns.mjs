// Conversations, as the server wants them and as the browser keeps them.

// What to ask: the picture goes with the first question. A description of the picture that was not asked for is no part
// of the conversation, since the models know no turn without a question. Answers that were stopped before their first word
// are left out.
export function messages(image, turns, question) {
  const asked = turns.filter((turn) => turn.question && turn.answer);
  const said = asked.flatMap((turn) => [
    { role: "user", content: [{ type: "text", text: turn.question }] },
    { role: "assistant", content: turn.answer },
  ]);
  const last = question ? [{ type: "text", text: question }] : [];
  said.push({ role: "user", content: last });
  said[0].content.unshift({ type: "image_url", image_url: { url: image } });
  return said;
}

// Which conversations have to go, the oldest first, so that at most so many of so many bytes stay.
export function surplus(conversations, maxCount, maxBytes) {
  const newestFirst = conversations.toSorted((a, b) => b.changed - a.changed);
  let bytes = 0;
  return newestFirst
    .filter((conversation, index) => {
      bytes += conversation.bytes;
      return index >= maxCount || bytes > maxBytes;
    })
    .map((conversation) => conversation.id);
}
