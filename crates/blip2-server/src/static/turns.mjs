// Conversations, as the server wants them and as the browser keeps them.

// What to send: the picture goes with the first question. Descriptions of the picture, for which there is no question, are
// no part of the conversation, since the models know no turn without one; nor are questions whose answer was stopped before
// its first word.
export function messages(image, turns, question) {
  const asked = question ? turns.filter(isSaid) : [];
  const said = asked.flatMap((turn) => [
    { role: "user", content: [{ type: "text", text: turn.question }] },
    { role: "assistant", content: turn.answer },
  ]);
  const last = question ? [{ type: "text", text: question }] : [];
  said.push({ role: "user", content: last });
  said[0].content.unshift({ type: "image_url", image_url: { url: image } });
  return said;
}

const isSaid = (turn) => turn.question && turn.answer;

// What was said before a turn, as /v1/explain wants it.
export function before(turns, turn) {
  return turns
    .slice(0, turns.indexOf(turn))
    .filter(isSaid)
    .map(({ question, answer }) => ({ question, answer }));
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
