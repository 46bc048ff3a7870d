"use strict";
// The page at /: chat with vectors to switch on, the plain reply beside the steered one, and what steering
// does to each token. Plain JavaScript, nothing from elsewhere; all text goes in as text, never as HTML.

const by = (id) => document.getElementById(id);
const histories = { plain: [], steered: [] };
let vectors = [];
let stopping = null;

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// -- the server ---------------------------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (by("key").value) headers.Authorization = `Bearer ${by("key").value}`;
  if (options.json) headers["Content-Type"] = "application/json";
  const body = options.json ? JSON.stringify(options.json) : options.body;
  const answer = await fetch(path, { ...options, headers, body });
  if (answer.ok) return answer;
  by("access").hidden = answer.status !== 401;
  const said = await answer.json().catch(() => null);
  const why = said && said.error ? said.error.message : `${path} answered ${answer.status}`;
  throw Object.assign(new Error(why), { status: answer.status });
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// -- models and vectors -------------------------------------------------------------------------------------

// anew: the name of a vector whose own settings come in the place of those that its box has.
async function load(anew) {
  const chosen = by("model").value;
  const models = (await (await call("/v1/models")).json()).data.filter((each) => !each.parent);
  by("model").replaceChildren(...models.map((each) => new Option(each.id, each.id)));
  if (models.some((each) => each.id === chosen)) by("model").value = chosen;
  const kept = switchedOn();
  kept.delete(anew);
  vectors = (await (await call("/v1/steering")).json()).data;
  showVectors(kept, anew);
  by("access").hidden = true;
  await loadInstructions();
  await resume();
}

// What has not changed stays as it is, with its settings and with the focus.
function showVectors(kept, anew) {
  const fitting = vectors.filter((each) => each.models.includes(by("model").value));
  const before = new Map([...by("vectors").children].map((box) => [box.dataset.key, box]));
  const boxes = fitting.map((each) => {
    const box = each.name !== anew && before.get(keyOf(each));
    return box || vectorBox(each, kept.get(each.name));
  });
  for (const box of before.values()) if (!boxes.includes(box)) box.remove();
  boxes.forEach((box, i) => {
    const here = by("vectors").children[i];
    if (here !== box) by("vectors").insertBefore(box, here || null);
  });
  by("no-vectors").hidden = fitting.length > 0;
}

const POSITIONS = ["all", "prompt", "last", "generation"];

// Other layers and positions than the file's own.
function where(vector, kept) {
  const row = element("div", undefined, "where");
  const layers = element("input");
  Object.assign(layers, { type: "text", inputMode: "numeric", pattern: "[0-9]+(\\s*,\\s*[0-9]+)*" });
  layers.value = (kept && kept.layer ? kept.layer : vector.settings.layer).join(", ");
  layers.title = `One or several of 0 to ${vector.n_layer - 1}, with commas`;
  layers.setAttribute("aria-label", `layers of ${vector.name}`);
  const positions = element("select");
  positions.append(...POSITIONS.map((each) => new Option(each, each)));
  positions.value = (kept && kept.positions) || vector.settings.positions;
  positions.setAttribute("aria-label", `positions of ${vector.name}`);
  const labels = [["layer", layers], ["at", positions]].map(([words, field]) => {
    const label = element("label", words);
    label.append(field);
    return label;
  });
  row.append(...labels);
  return row;
}

function keyOf(vector) {
  return `${vector.name} ${vector.sha256}`;
}

function vectorBox(vector, kept) {
  const strength = kept && kept.strength;
  const box = element("div", undefined, "vector");
  box.dataset.name = vector.name;
  box.dataset.key = keyOf(vector);
  const label = element("label");
  const on = element("input");
  on.type = "checkbox";
  on.setAttribute("role", "switch");
  on.checked = strength !== undefined;
  label.append(on, element("span", vector.name, "name"));
  const slider = element("input");
  Object.assign(slider, { type: "range", min: Math.min(0, 2 * vector.settings.strength), step: 0.05 });
  slider.max = Math.max(2, 2 * vector.settings.strength);
  slider.value = strength === undefined ? vector.settings.strength : strength;
  slider.setAttribute("aria-label", `strength of ${vector.name}`);
  const shown = element("output", Number(slider.value).toFixed(2));
  slider.addEventListener("input", () => { shown.textContent = Number(slider.value).toFixed(2); });
  const row = element("div", undefined, "strength");
  row.append(slider, shown);
  const { layer, mode, positions } = vector.settings;
  const layers = `layer${layer.length > 1 ? "s" : ""} ${layer.join(", ")}`;
  box.append(label, row, element("p", `${layers}, ${mode}, positions ${positions}`, "note"));
  box.append(where(vector, kept));
  const figures = figuresOf(vector.validation);
  if (figures) box.append(element("p", figures, "figures"));
  return box;
}

// What tuning (a record) or first use (a list of settings, the best first) left in the file.
function figuresOf(validation) {
  const percent = (share) => `${Math.round(100 * share)}%`;
  if (Array.isArray(validation) && validation[0] && typeof validation[0].score === "number") {
    return `followed by ${percent(validation[0].score)} of validation replies`;
  }
  const scores = validation && validation.scores;
  if (!scores || typeof scores.steered !== "number") return "";
  const plain = typeof scores.none === "number" ? `, ${percent(scores.none)} without` : "";
  return `followed by ${percent(scores.steered)} of validation replies${plain}`;
}

// What is switched on, as the field `steering` of a request: layers and positions where they are not the file's.
function steering() {
  return [...document.querySelectorAll(".vector")]
    .filter((box) => box.querySelector("[role=switch]").checked)
    .map((box) => {
      const { settings } = vectors.find((each) => each.name === box.dataset.name);
      const item = { name: box.dataset.name, strength: Number(box.querySelector("[type=range]").value) };
      const layer = layersIn(box.querySelector("[type=text]"));
      if (layer.join() !== settings.layer.join()) item.layer = layer;
      const positions = box.querySelector("select").value;
      if (positions !== settings.positions) item.positions = positions;
      return item;
    });
}

function layersIn(field) {
  if (!field.value.trim() || !field.checkValidity()) {
    throw new Error(`${field.getAttribute("aria-label")}: write numbers with commas, as in 12 or 3, 4.`);
  }
  return [...new Set(field.value.split(",").map(Number))].sort((a, b) => a - b);
}

function switchedOn() {
  try {
    return new Map(steering().map((each) => [each.name, each]));
  } catch {
    return new Map();
  }
}

async function upload() {
  const [file] = by("upload").files;
  if (!file) return;
  const name = encodeURIComponent(file.name.replace(/\.gguf$/i, ""));
  await call(`/v1/steering?name=${name}`, { method: "POST", body: file });
  by("upload").value = "";
  await load();
}

// -- a turn -------------------------------------------------------------------------------------------------

function replyBox(kind, title) {
  const box = element("div", undefined, `reply ${kind}`);
  const text = element("p", "", "text");
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `${title} reply`);
  box.append(element("p", title, "who"), text);
  return { box, text };
}

// -- chats that are kept in this browser --------------------------------------------------------------------

const STORE = "localsteer.chats";
const KEPT_CHATS = 30;
let turns = [];  // of this chat: {question, replies: [{kind, title, text}]}
let chatId = newId();

function newId() {
  return `${Date.now()}-${Math.random().toString(36).slice(2)}`;
}

function savedChats() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) || "[]");
    const isTurn = (turn) => turn && typeof turn.question === "string" && Array.isArray(turn.replies);
    const isChat = (each) => each && Array.isArray(each.turns) && each.turns.length && each.turns.every(isTurn);
    return Array.isArray(found) ? found.filter(isChat) : [];
  } catch {
    return [];
  }
}

function store(chats) {
  try {
    localStorage.setItem(STORE, JSON.stringify(chats.slice(0, KEPT_CHATS)));
  } catch {
    by("trouble").textContent = "This browser keeps no more: the chat is lost when the page is closed.";
  }
  showSaved();
}

function saveChat(id, ofChat, kept) {
  if (ofChat.length) store([{ id, turns: ofChat, histories: kept }, ...savedChats().filter((each) => each.id !== id)]);
}

function showSaved() {
  const options = savedChats().map((each) => new Option(String(each.turns[0].question).slice(0, 60), each.id));
  by("saved").replaceChildren(new Option("Saved chats", ""), ...options);
  by("saved").value = chatId;
  if (by("saved").selectedIndex < 0) by("saved").value = "";
  by("forget").disabled = by("saved").value === "";
}

function newChat() {
  if (stopping) stopping.abort();
  histories.plain = [];
  histories.steered = [];
  turns = [];
  chatId = newId();
  by("chat").replaceChildren();
  showSaved();
}

function openChat(id) {
  const found = savedChats().find((each) => each.id === id);
  newChat();
  if (!found) return;
  chatId = found.id;
  turns = found.turns;
  for (const kind of ["plain", "steered"]) {
    histories[kind] = Array.isArray((found.histories || {})[kind]) ? found.histories[kind] : [];
  }
  for (const turn of turns) {
    const replies = turnBox(turn.question);
    for (const each of turn.replies) {
      const place = replyBox(each.kind === "steered" ? "steered" : "plain", each.title);
      place.text.textContent = each.text;
      replies.append(place.box);
    }
  }
  showSaved();
}

// -- the same elsewhere -------------------------------------------------------------------------------------

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// The command and the request that do what the page is set to.
function elsewhere() {
  const question = by("question").value.trim() || (turns.length ? turns.at(-1).question : "Tell me about foxes.");
  const model = by("model").value;
  const temperature = Number(by("temperature").value);
  let applied;
  try {
    applied = steering();
  } catch (error) {
    by("command").textContent = by("curl").textContent = error.message;
    return;
  }
  const specs = applied.map((each) => {
    const layers = each.layer ? `@${each.layer.join(",")}` : "";
    return ` -s ${quoted(`${each.name}.gguf:${each.strength}${layers}`)}`;
  });
  const positions = new Set(applied.map((each) => each.positions));
  const [same] = positions.size === 1 ? positions : [];
  const differ = positions.size > 1 ? "\n# --positions is one for all vectors: some here have their own" : "";
  by("command").textContent = `localsteer run -m ${quoted(model)}${specs.join("")}`
    + `${same ? ` --positions ${same}` : ""} --temp ${temperature} ${quoted(question)}${differ}`;
  const request = { model, messages: [{ role: "user", content: question }], temperature };
  if (applied.length) request.steering = applied;
  const key = by("key").value ? ' -H "Authorization: Bearer $LOCALSTEER_API_KEY"' : "";
  by("curl").textContent = `curl ${location.origin}/v1/chat/completions${key} --json ${quoted(JSON.stringify(request))}`;
}

// -- a turn of the chat -------------------------------------------------------------------------------------

function turnBox(question) {
  const turn = element("div", undefined, "turn");
  const replies = element("div", undefined, "replies");
  turn.append(element("p", question, "question"), replies);
  by("chat").append(turn);
  return replies;
}

async function reply(kind, question, applied, place) {
  const history = histories[kind];  // of this chat, also where a new one begins meanwhile
  const messages = [...history, { role: "user", content: question }];
  const request = {
    model: by("model").value, messages, stream: true, temperature: Number(by("temperature").value),
  };
  if (kind === "steered") request.steering = applied;
  const answer = await call("/v1/chat/completions", {
    method: "POST", json: request, signal: stopping.signal,
  });
  try {
    for await (const each of events(answer)) {
      if (each.error) throw new Error(each.error.message);
      const delta = each.choices[0] && each.choices[0].delta.content;
      if (delta) place.text.textContent += delta;
      by("chat").scrollTop = by("chat").scrollHeight;
    }
  } finally {
    history.push({ role: "user", content: question });
    history.push({ role: "assistant", content: place.text.textContent });
  }
  if (kind === "steered" && by("projection").checked && place.text.textContent) {
    const trace = await call("/v1/steering/trace", {
      method: "POST", signal: stopping.signal,
      json: { model: request.model, messages, steering: applied, reply: place.text.textContent },
    });
    place.box.append(projection(await trace.json()));
  }
}

// Each token on a ground that deepens from 0, the projection without the instruction, to 1, with it.
function projection(trace) {
  const box = element("div", undefined, "projection");
  box.setAttribute("aria-live", "off");  // the reply, which is read out, word by word once more
  for (const line of trace.lines) {
    box.append(element("p", `${line.vector}, layer ${line.layer}: projection of each token`));
    const tokens = element("div", undefined, "tokens");
    trace.tokens.forEach((token, i) => {
      const share = line.share[i];
      const made = element("span", token.text, i < trace.n_prompt ? "token prompt" : "token");
      if (i === trace.n_prompt) made.classList.add("first");
      if (share !== null && share !== undefined) {
        made.classList.toggle("below", share < 0);
        made.style.setProperty("--share", Math.min(1, Math.abs(share)).toFixed(3));
        const plain = line.plain_share[i];
        made.title = `${share.toFixed(2)} steered` + (plain === null ? "" : `, ${plain.toFixed(2)} plain`);
      }
      tokens.append(made);
    });
    box.append(tokens, numbersOf(line, trace.tokens));
  }
  box.append(element("p", "No colour: 0, the mean without the instruction. Full blue: 1, the mean with it. Orange: below 0."));
  return box;
}

// What the colours say, for those who don't see them, or have no pointer to rest on a token.
function numbersOf(line, tokens) {
  const details = element("details");
  const table = element("table");
  const box = element("div", undefined, "numbers");
  const head = table.createTHead().insertRow();
  for (const title of ["token", "steered", "plain"]) {
    head.append(Object.assign(element("th", title), { scope: "col" }));
  }
  const body = table.createTBody();
  const number = (share) => (typeof share === "number" ? share.toFixed(2) : "");
  tokens.forEach((token, i) => {
    const row = body.insertRow();
    const name = Object.assign(element("th", token.text.trim() ? token.text : JSON.stringify(token.text)), { scope: "row" });
    row.append(name, element("td", number(line.share[i])), element("td", number(line.plain_share[i])));
  });
  box.tabIndex = 0;  // it scrolls
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", `projection on ${line.vector} of each token`);
  box.append(table);
  details.append(element("summary", "In numbers"), box);
  return details;
}

async function ask(question) {
  const applied = steering();
  const kinds = applied.length === 0 ? ["plain"] : by("compare").checked ? ["plain", "steered"] : ["steered"];
  const names = applied.map((each) => `${each.name} ${each.strength.toFixed(2)}`).join(" + ");
  const replies = turnBox(question);
  const record = { question, replies: [] };
  const [id, ofChat] = [chatId, turns];  // a new chat may begin meanwhile
  stopping = new AbortController();
  busy(true);
  // one conversation goes on whichever way the earlier turns were answered
  if (!kinds.includes("plain")) histories.plain = histories.steered;
  if (!kinds.includes("steered")) histories.steered = histories.plain;
  if (kinds.length === 2 && histories.plain === histories.steered) histories.steered = [...histories.plain];
  const working = kinds.map((kind) => {
    const title = kind === "plain" ? "plain" : names;
    const place = replyBox(kind, title);
    place.box.setAttribute("aria-busy", "true");  // read out when it is whole, not token by token
    replies.append(place.box);
    const work = reply(kind, question, applied, place).catch((error) => {
      const words = error.name === "AbortError" ? "stopped" : error.message;
      place.box.append(element("p", words, "error"));
    });
    return work.finally(() => {
      place.box.setAttribute("aria-busy", "false");
      record.replies.push({ kind, title, text: place.text.textContent });
    });
  });
  await Promise.all(working);
  if (record.replies.some((each) => each.text)) {
    ofChat.push(record);
    if (id === chatId) saveChat(id, ofChat, histories);
  }
  busy(false);
}

function busy(is) {
  const at = document.activeElement;  // what goes away must not take the focus along
  by("stop").hidden = !is;
  if (is && at === by("send")) by("stop").focus();
  if (!is && at === by("stop")) by("question").focus();
  by("send").disabled = is;
  by("said").textContent = is ? "Answering; Escape stops." : "";
  document.body.dataset.busy = is;
}

// -- wiring -------------------------------------------------------------------------------------------------

function guarded(action) {
  return async (...given) => {
    by("trouble").textContent = "";
    try {
      await action(...given);
    } catch (error) {
      by("trouble").textContent = error.message;
    }
  };
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = by("question").value.trim();
  if (!question || by("send").disabled) return;
  guarded(async () => {
    steering();  // what can't be asked is said before the question is gone
    by("question").value = "";
    await ask(question);
  })();
});
by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("ask").requestSubmit();
  }
});
by("stop").addEventListener("click", () => stopping.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !by("stop").hidden) stopping.abort();
});
by("clear").addEventListener("click", () => {
  newChat();
  by("question").focus();
});
by("saved").addEventListener("change", () => openChat(by("saved").value));
by("forget").addEventListener("click", () => {
  const id = by("saved").value;
  newChat();
  store(savedChats().filter((each) => each.id !== id));
  by("saved").focus();  // there is nothing more to delete
});
by("same").addEventListener("toggle", elsewhere);
document.addEventListener("input", () => { if (by("same").open) elsewhere(); });
document.addEventListener("change", () => { if (by("same").open) elsewhere(); });
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", guarded(async () => {
    await navigator.clipboard.writeText(by(button.dataset.copy).textContent);
    by("said").textContent = "Copied.";
  }));
}
by("model").addEventListener("change", () => {
  showVectors(switchedOn());
  guarded(loadInstructions)();
});
by("upload").addEventListener("change", guarded(upload));
by("access").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(load)();
});
wireMaking();
showSaved();
guarded(load)();
