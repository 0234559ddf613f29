// Tables as files: CSV (RFC 4180) for spreadsheets, JSON lines for programs.

// What spreadsheets take for a formula: a file of captions must not be one that computes.
const FORMULA = /^[=+\-@\t\r\n＝＋－＠]/;

const field = (value) => {
  const text = String(value ?? "");
  const safe = typeof value === "string" && FORMULA.test(text) ? `'${text}` : text;
  return /[",\r\n']/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
};

// `rows` are lists of values.
export const csv = (rows) => rows.map((row) => `${row.map(field).join(",")}\r\n`).join("");

// `rows` are objects.
export const jsonLines = (rows) => rows.map((row) => `${JSON.stringify(row)}\n`).join("");
