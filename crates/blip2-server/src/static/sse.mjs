// Server-sent events, as far as answers use them: the data of each, from pieces that are cut anywhere.

export class EventReader {
  #rest = "";
  #data = [];

  // The data of the events that `text` completes.
  push(text) {
    this.#rest += text;
    const events = [];
    for (;;) {
      // A carriage return at the end may be half of a line's end.
      const end = this.#rest.search(/\r\n|\n|\r(?!$)/);
      if (end < 0) return events;
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + (this.#rest.startsWith("\r\n", end) ? 2 : 1));
      if (line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      } else if (line === "" && this.#data.length) {
        events.push(this.#data.join("\n"));
        this.#data = [];
      }
    }
  }
}
