"use strict";

const at = (id) => document.getElementById(id);

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const count = (number) => number.toLocaleString("en");

function size(bytes) {
  for (const [unit, of] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) {
    if (bytes >= of) return `${(bytes / of).toPrecision(3)} ${unit}`;
  }
  return `${bytes} bytes`;
}

async function json(path, options) {
  const response = await fetch(path, options);
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
}

function showBytes(model) {
  const total = Object.values(model.bytes).reduce((sum, bytes) => sum + bytes, 0);
  for (const [part, bytes] of Object.entries(model.bytes)) {
    const share = element("span");
    share.style.width = `${(100 * bytes) / total}%`;
    at("bar").append(share);
    const item = element("li");
    item.append(element("i"), `${part}: ${size(bytes)}`);
    at("legend").append(item);
  }
  at("bar").setAttribute("aria-label", `${count(total)} bytes`);
  const tables = `all: ${size(total)}; the tables dense, in float32: ${size(model.dense_table_bytes)}`;
  at("legend").append(element("li", tables));
}

function showFields(model) {
  for (const field of model.fields) {
    const row = element("tr");
    row.append(
      element("td", field.name),
      element("td", field.kind),
      element("td", field.encoding),
      element("td", count(field.rows), { class: "n" }),
      element("td", field.dim, { class: "n" }),
      element("td", `${((100 * field.kept) / (field.rows * field.dim)).toFixed(1)} %`, { class: "n" }),
      element("td", `${field.layout} ${field.dtype}`),
      element("td", count(field.bytes), { class: "n" }),
      element("td", "", { id: `kept.${field.name}` }),
    );
    at("fields").append(row);
  }
}

function showForm(model) {
  const inputs = new Map();
  for (const input of [...model.fields, ...model.numeric]) {
    if (inputs.has(input.column)) continue;
    const between = input.separator === " " ? "spaces" : input.separator || "|";
    const hint = input.kind === "multi" ? `, keys with ${between} between` : "";
    const label = element("label", `${input.column}${hint}`);
    const box = element("input", "", { name: input.column, autocomplete: "off", value: input.example });
    label.append(box);
    at("sample").append(label);
    inputs.set(input.column, box);
  }
  at("sample").append(element("button", "Score"));
  at("sample").addEventListener("submit", (event) => {
    event.preventDefault();
    score(Object.fromEntries([...inputs].map(([column, box]) => [column, box.value])));
  });
  at("sample").requestSubmit();
}

async function score(sample) {
  try {
    const found = await json("page/score", { method: "POST", body: JSON.stringify(sample) });
    at("score").className = "";
    at("score").textContent = `score ${found.score.toPrecision(6)}`;
    for (const field of found.fields) at(`kept.${field.name}`).replaceChildren(...field.keys.map(shownKey));
  } catch (error) {
    at("score").className = "bad";
    at("score").textContent = error.message;
  }
}

function shownKey(own) {
  const kept = own.vector.filter((value) => value !== 0).length;
  const line = element("div", "", { class: "key" });
  const cells = element("span", "", { class: "cells", role: "img", "aria-label": `${kept} of ${own.vector.length}` });
  for (const [column, value] of own.vector.entries()) {
    cells.append(element("i", "", { class: value ? "kept" : "", title: `column ${column}: ${value}` }));
  }
  const what = own.known ? `${kept} of ${own.vector.length}` : `${kept} of ${own.vector.length}, unknown key`;
  line.append(element("b", own.key || "(missing)", { title: own.key }), cells, element("em", what));
  return line;
}

async function start() {
  try {
    const model = await json("page/model");
    document.title = at("title").textContent = model.name;
    const budget = model.budget === null ? "not pruned" : `pruned to budget ${model.budget}`;
    at("what").textContent =
      `${model.model}, ${budget}, seed ${model.seed}. Golden requests score within ` +
      `${model.golden_difference.toExponential(1)} of the trained model.`;
    at("version").textContent = model.version;
    at("card").textContent = model.card || "These tables were not published, so they have no card.";
    showBytes(model);
    showFields(model);
    document.querySelector("main").hidden = false;
    showForm(model);
  } catch (error) {
    at("problem").textContent = `No model is served: ${error.message}`;
    at("problem").hidden = false;
  }
}

start();
