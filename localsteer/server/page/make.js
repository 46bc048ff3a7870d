"use strict";
// From an instruction of the catalogue, or a sentence, to a vector: a job of the server that is followed here.
// page.js, which comes behind this, calls wireMaking.

const POLL_SECONDS = 0.7;
const SAY_SECONDS = 10;  // between two announcements of a best so far
const ENDED = ["succeeded", "cancelled", "failed"];
const EXAMPLE = "Tell me about foxes.";
let known = [];  // instructions of the catalogue
let methods = {};  // {search or learn: why it is not there, or null}
let following = null;  // id of the job that is shown
let said = { at: 0, best: "" };

// -- what a vector can be made of ---------------------------------------------------------------------------

async function loadInstructions() {
  const answer = await call(`/v1/instructions?model=${encodeURIComponent(by("model").value)}`);
  const found = await answer.json();
  known = found.data;
  methods = Object.fromEntries(found.methods.map((each) => [each.id, each.why_not]));
  const chosen = by("catalogue").value;
  by("catalogue").replaceChildren(new Option("a sentence of your own", ""), ...known.map((each) => {
    return new Option(`${each.id}: ${each.text}${each.vector ? " (there already)" : ""}`, each.id);
  }));
  by("catalogue").value = chosen;
  if (by("catalogue").selectedIndex < 0) by("catalogue").value = "";
  by("how").hidden = Boolean(methods.learn);
  by("make-off").hidden = !methods.search;
  by("make-off").textContent = methods.search ? `This server makes no vectors: ${methods.search}.` : "";
  showChoice();
}

function chosenInstruction() {
  return known.find((each) => each.id === by("catalogue").value);
}

function showChoice() {
  const entry = chosenInstruction();
  by("own").hidden = Boolean(entry);
  const method = document.querySelector("[name=method]:checked").value;
  by("begin").textContent = entry && entry.vector ? "Use it" : method === "learn" ? "Learn it" : "Find it";
}

async function beginJob() {
  const entry = chosenInstruction();
  if (entry && entry.vector) {
    use(entry.vector);
    return;
  }
  const instruction = entry ? entry.id : by("sentence").value.trim();
  if (!instruction) {
    by("sentence").focus();
    throw new Error("Write what the replies should be like, as in: Answer in rhyme.");
  }
  const chosen = document.querySelector("[name=method]:checked").value;
  const job = await post({ model: by("model").value, instruction, method: methods.learn ? "search" : chosen });
  follow(job, true);
}

async function post(request) {
  return (await call("/v1/jobs", { method: "POST", json: request })).json();
}

// -- a job under way ----------------------------------------------------------------------------------------

// One that was under way when the page was left is shown again.
async function resume() {
  if (following) return;
  const jobs = (await (await call("/v1/jobs")).json()).data;
  const under = jobs.filter((each) => !ENDED.includes(each.status));
  if (under.length) follow(under[0], false);
}

function follow(job, byUser) {
  following = job.id;
  said = { at: Date.now(), best: "" };
  by("outcome").hidden = true;
  by("job").hidden = false;
  by("begin").disabled = true;
  showJob(job);
  by("job-said").textContent = `${titleOf(job)} has begun.`;
  if (byUser) by("job-stop").focus();  // the button that was pressed can't be pressed any more
  setTimeout(() => poll(job.id), 1000 * POLL_SECONDS);
}

function titleOf(job) {
  return `${job.method === "learn" ? "Learning" : "The search for"} ${wordsOf(job)} on ${job.model}`;
}

// The catalogue's name, or the sentence.
function wordsOf(job) {
  const isKnown = !job.text || known.some((each) => each.id === job.instruction);
  return isKnown ? job.instruction : `\u201c${job.text}\u201d`;
}

async function poll(id, failures = 0) {
  let job;
  try {
    job = await (await call(`/v1/jobs/${id}`)).json();
  } catch (error) {
    by("job-now").textContent = `${error.message}`;
    const wait = Math.min(30, 2 ** failures);
    if (error.status === 404) finish({ id, status: "failed", error: error.message, instruction: "", model: "" });
    else setTimeout(() => poll(id, failures + 1), 1000 * wait);
    return;
  }
  if (ENDED.includes(job.status)) {
    await guarded(finish)(job);
    return;
  }
  showJob(job);
  setTimeout(() => poll(id), 1000 * POLL_SECONDS);
}

function showJob(job) {
  by("job-title").textContent = titleOf(job);
  const count = job.total ? ` (${job.done} of ${job.total})` : job.done ? ` (${job.done})` : "";
  const doing = {
    queued: `waiting; ${job.before} ahead of it`,
    stopping: "stopping: what was found is checked and kept",
  }[job.status] || `${job.doing || "starting"}${count}`;
  by("job-now").textContent = `${doing}, ${Math.round(job.seconds)} s`;
  by("job-best").textContent = job.best ? `Best so far: ${job.best}.` : "";
  if (job.total) by("job-bar").value = job.done / job.total;
  else by("job-bar").removeAttribute("value");
  by("job-stop").textContent = job.status === "stopping" ? "Stop at once" : "Stop, keep the best so far";
  if (job.best && job.best !== said.best && Date.now() - said.at > 1000 * SAY_SECONDS) {
    said = { at: Date.now(), best: job.best };
    by("job-said").textContent = by("job-best").textContent;
  }
}

async function stopJob() {
  showJob(await (await call(`/v1/jobs/${following}`, { method: "DELETE" })).json());
}

async function finish(job) {
  const hadFocus = by("job").contains(document.activeElement);
  following = null;
  by("job").hidden = true;
  by("begin").disabled = false;
  showOutcome(job);
  if (hadFocus) by("outcome-title").focus();
  if (!job.vector) return;
  await load(job.vector);
  use(job.vector);
}

// -- what came of it ----------------------------------------------------------------------------------------

function showOutcome(job) {
  const { title, lines } = outcomeOf(job);
  by("outcome-title").textContent = title;
  by("outcome-text").replaceChildren(...lines.map((line) => element("p", line)));
  if (job.result && job.result.n) by("outcome-text").append(figuresTable(job.result));
  if (job.name) {
    by("outcome-text").append(element("p", "The same on the command line:", "note"), element("pre", commandOf(job)));
  }
  by("outcome-try").hidden = !job.vector;
  by("outcome-try").onclick = guarded(() => tryOut(true));
  by("outcome-learn").hidden = !(job.result && job.result.learning) || Boolean(methods.learn);
  by("outcome-learn").onclick = guarded(async () => {
    const instruction = known.some((each) => each.id === job.instruction) ? job.instruction : job.text;
    follow(await post({ model: job.model, instruction, method: "learn" }), true);
  });
  by("outcome").hidden = false;
  by("job-said").textContent = [title, ...lines].join(" ");
}

function outcomeOf(job) {
  const what = wordsOf(job);
  if (job.status === "failed") return { title: `No vector of ${what}`, lines: [job.error] };
  if (job.status === "cancelled") {
    return { title: `Stopped: no vector of ${what}`, lines: ["Nothing had been found by then."] };
  }
  const { result } = job;
  const advice = result.advice || [];
  if (!result.helps) {
    const lines = ["Nothing was found that helps, so nothing was added.", ...advice.map(sentence)];
    return { title: `No vector of ${what}`, lines: result.learning ? [...lines, result.learning] : lines };
  }
  const { layer, positions, strength } = result.setting;
  const place = `It steers layer${layer.length > 1 ? "s" : ""} ${layer.join(", ")} at strength ${strength}, positions `
    + `${positions}; ${job.method === "learn" ? "learned" : "found"} in ${Math.round(job.seconds)} s.`;
  return { title: `${job.vector} is ready`, lines: [...effectOf(result), place, ...advice.map(sentence)] };
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

const outOf = (share, n) => `${Math.round(share * n)} of ${n}`;

// What it does and what it costs, in words; a share that was not asked for is left out.
function effectOf({ scores, degenerate, judged_by, n }) {
  const shares = (values) => [["steered", "steered"], ["none", "plain"], ["instructed", "told in words"],
    ["both", "told and steered"]]
    .filter(([key]) => values && typeof values[key] === "number")
    .map(([key, words]) => `${words} ${outOf(values[key], n)}`).join(", ");
  const good = shares(scores);
  if (!n || !good) return [];
  const lines = [judged_by === "verifier"
    ? `Replies to ${n} other questions that follow it: ${good}.`
    : `No rule can judge whether a reply follows this. Sound replies to ${n} other questions: ${good}.`];
  const broken = degenerate && degenerate.steered;
  if (typeof broken === "number") {
    lines.push(broken ? `What it costs: ${outOf(broken, n)} steered replies are broken (they loop or make no sense); `
      + `plain ${outOf(degenerate.none, n)}.` : "None of its replies is broken.");
  }
  return lines;
}

function figuresTable({ scores, degenerate, judged_by, n }) {
  const table = element("table");
  table.append(element("caption", `Of ${n} replies each`));
  const head = table.insertRow();
  for (const words of ["", judged_by === "verifier" ? "follow it" : "sound", "broken"]) {
    const cell = element(words ? "th" : "td", words);
    if (words) cell.scope = "col";
    head.append(cell);
  }
  const rows = [["none", "plain"], ["instructed", "told in words"], ["steered", "steered"], ["both", "told and steered"]];
  for (const [key, words] of rows) {
    const row = table.insertRow();
    const name = element("th", words);
    name.scope = "row";
    const cells = [scores, degenerate].map((values) => {
      return element("td", values && typeof values[key] === "number" ? `${Math.round(100 * values[key])}%` : "-");
    });
    row.append(name, ...cells);
  }
  return table;
}

function commandOf(job) {
  const what = known.some((each) => each.id === job.instruction) ? job.instruction : job.text;
  const option = job.method === "learn" ? "-i" : "--instruction";
  const command = job.method === "learn" ? "learn" : "tune";
  return `localsteer ${command} -m ${quoted(job.model)} ${option} ${quoted(what)} -o ${quoted(`${job.name}.gguf`)}`;
}

// -- trying it ----------------------------------------------------------------------------------------------

// Switch a vector on, at its own settings, and answer the question with it and without.
function use(name) {
  const box = document.querySelector(`.vector[data-name="${CSS.escape(name)}"]`);
  if (!box) return;
  box.querySelector("[role=switch]").checked = true;
  box.scrollIntoView({ block: "nearest" });
  document.dispatchEvent(new Event("change"));
  guarded(() => tryOut(false))();
}

// asked: by a button. By itself it neither cuts off a reply nor sends what is still being written.
async function tryOut(asked) {
  const written = by("question").value.trim();
  const isWriting = document.activeElement === by("question") && written;
  if (by("send").disabled || (!asked && isWriting)) return;
  const question = written || (turns.length ? turns.at(-1).question : EXAMPLE);
  if (!written && turns.length) newChat();  // or the model would repeat what it has said
  steering();
  by("question").value = "";
  await ask(question);
}

function wireMaking() {
  by("make").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!by("begin").disabled) guarded(beginJob)();
  });
  by("catalogue").addEventListener("change", showChoice);
  by("how").addEventListener("change", showChoice);
  by("job-stop").addEventListener("click", guarded(stopJob));
}
