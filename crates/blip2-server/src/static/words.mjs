// The words and sentences of an answer.

const WORD = /[\p{L}\p{N}\p{M}]+(?:['’.-][\p{L}\p{N}\p{M}]+)*/gu;
const LETTER = /[\p{L}\p{N}]/u;

// A text cut into words and what stands between them, nothing lost. Each word tells which of its like it is, counted from
// 1 as the server counts: among the places where it stands between other characters than letters and digits.
export function words(text) {
  const pieces = [];
  let end = 0;
  for (const { 0: word, index } of text.matchAll(WORD)) {
    if (index > end) pieces.push({ text: text.slice(end, index) });
    pieces.push({ text: word, nth: places(text, word).filter((place) => place <= index).length });
    end = index + word.length;
  }
  if (end < text.length) pieces.push({ text: text.slice(end) });
  return pieces;
}

function places(text, word) {
  const [inside, sought] = [text.toLowerCase(), word.toLowerCase()];
  const found = [];
  for (let at = inside.indexOf(sought); at >= 0; at = inside.indexOf(sought, at + sought.length)) {
    const before = [...inside.slice(0, at)].pop() ?? "";
    const after = [...inside.slice(at + sought.length)][0] ?? "";
    if (!LETTER.test(before) && !LETTER.test(after)) found.push(at);
  }
  return found;
}

// How much of a growing text, from `start`, is whole sentences: what a screen reader can say already.
export function sentencesEnd(text, start) {
  let end = start;
  for (const { index, 0: mark } of text.slice(start).matchAll(/[.!?。！？]+(?=\s)|\n/g)) {
    end = start + index + mark.length;
  }
  return end;
}
