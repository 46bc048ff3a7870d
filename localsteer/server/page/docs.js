"use strict";
// A plain view of /openapi.json: no library, nothing from elsewhere.

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function named(ref, api) {
  return ref.split("/").slice(1).reduce((at, key) => at && at[key], api);
}

function kindOf(schema, api) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  const several = schema.anyOf || schema.oneOf;
  if (several) return several.map((each) => kindOf(each, api)).filter((each) => each !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return "list of " + (kindOf(schema.items, api) || "anything");
  const bounds = ["minimum", "maximum", "exclusiveMinimum", "maxLength", "maxItems"]
    .filter((key) => schema[key] !== undefined).map((key) => `${key} ${schema[key]}`);
  return [schema.type || "anything", ...bounds].join(", ");
}

function fields(schema, api) {
  const found = schema && schema.$ref ? named(schema.$ref, api) : schema;
  if (!found || !found.properties) return element("p", kindOf(schema, api), "note");
  const table = element("table");
  for (const [name, each] of Object.entries(found.properties)) {
    const row = table.insertRow();
    const needed = (found.required || []).includes(name);
    row.append(element("th", name + (needed ? " *" : "")), element("td", kindOf(each, api)),
      element("td", each.description || ""));
  }
  return table;
}

function operation(path, method, what, api) {
  const box = element("details");
  const head = element("summary");
  head.append(element("b", method.toUpperCase(), "method"), element("code", path), element("span", what.summary || ""));
  box.append(head);
  if (what.description) box.append(element("p", what.description));
  for (const each of what.parameters || []) {
    box.append(element("p", `${each.in} ${each.name}${each.required ? " *" : ""}: ${kindOf(each.schema, api)}`, "note"));
  }
  const content = what.requestBody && what.requestBody.content;
  for (const [type, body] of Object.entries(content || {})) {
    box.append(element("p", type, "note"), fields(body.schema, api));
  }
  return box;
}

async function show() {
  const key = document.getElementById("key").value;
  const answer = await fetch("/openapi.json", key ? { headers: { Authorization: `Bearer ${key}` } } : {});
  document.getElementById("access").hidden = answer.ok;
  if (!answer.ok) return;
  const api = await answer.json();
  const main = document.getElementById("paths");
  main.replaceChildren();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, what] of Object.entries(methods)) main.append(operation(path, method, what, api));
  }
  const schemas = Object.entries(api.components.schemas);
  for (const [name, schema] of schemas) {
    const box = element("details");
    box.append(element("summary", name), fields(schema, api));
    main.append(box);
  }
}

document.getElementById("access").addEventListener("submit", (event) => {
  event.preventDefault();
  show();
});
show();
