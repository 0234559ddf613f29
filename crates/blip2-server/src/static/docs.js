// Shows /openapi.json: each address, what it takes and what it gives.
"use strict";

const element = (tag, text, children = []) => {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
};

// `{"$ref": "#/components/schemas/Name"}` is that schema.
const resolve = (description, value) =>
  value && value.$ref
    ? value.$ref.split("/").slice(1).reduce((at, name) => at[name], description)
    : value;

const typeOf = (description, schema) => {
  const resolved = resolve(description, schema) || {};
  if (resolved.anyOf) return resolved.anyOf.map((one) => typeOf(description, one)).join(" or ");
  if (resolved.type === "array") return `list of ${typeOf(description, resolved.items)}`;
  return [].concat(resolved.type || "value").join(" or ");
};

const fields = (description, schema) => {
  const resolved = resolve(description, schema) || {};
  const rows = Object.entries(resolved.properties || {}).map(([name, field]) => {
    const needed = (resolved.required || []).includes(name) ? " (needed)" : "";
    const about = (resolve(description, field) || {}).description || "";
    return element("tr", "", [
      element("th", name + needed),
      element("td", typeOf(description, field)),
      element("td", field.description || about),
    ]);
  });
  return rows.length ? element("table", "", rows) : element("p", resolved.description || "");
};

const address = (description, path, method, operation) => {
  const body = operation.requestBody && operation.requestBody.content["application/json"];
  const parts = [element("h2", `${method.toUpperCase()} ${path}`), element("p", operation.summary)];
  if (operation.description) parts.push(element("p", operation.description));
  if (body) parts.push(fields(description, body.schema));
  if (body && body.example) parts.push(element("pre", JSON.stringify(body.example, null, 2)));
  return element("section", "", parts);
};

const show = (description) => {
  document.getElementById("about").textContent = description.info.description;
  const sections = Object.entries(description.paths).flatMap(([path, operations]) =>
    Object.entries(operations)
      .filter(([method]) => ["get", "post"].includes(method))
      .map(([method, operation]) => address(description, path, method, operation)),
  );
  document.getElementById("addresses").replaceChildren(...sections);
};

fetch("openapi.json")
  .then((response) => response.json())
  .then(show)
  .catch(() => {
    document.getElementById("addresses").textContent = "The description cannot be read.";
  });
