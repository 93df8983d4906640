// The page: a chat over this server's own API, and a run's records. No library, no storage but this browser's.
"use strict";

const at = (id) => document.getElementById(id);
const make = (tag, facts = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), facts);
  element.append(...children);
  return element;
};

// ---- requests ------------------------------------------------------------------------------------------------------

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await askToken();
    return call(path, options);
  }
  return answer;
}

function askToken() {
  const dialog = at("ask-token");
  at("token").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("token", at("token").value.trim());
      resolve();
    }, { once: true });
  });
}

// Server-sent events, each a line "data: …"; what begins with ":" keeps the connection awake.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

// ---- text ----------------------------------------------------------------------------------------------------------

const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\s][^*\n]*\*)|\[([^\]\n]+)\]\((https?:[^)\s]+)\)/g;

function inline(text) {
  const parts = [];
  let start = 0;
  for (const found of text.matchAll(INLINE)) {
    parts.push(text.slice(start, found.index));
    const [whole, code, strong, light, label, address] = found;
    if (code) parts.push(make("code", { textContent: code.slice(1, -1) }));
    else if (strong) parts.push(make("strong", {}, ...inline(strong.slice(2, -2))));
    else if (light) parts.push(make("em", {}, ...inline(light.slice(1, -1))));
    else parts.push(make("a", { href: address, textContent: label, rel: "noopener noreferrer", target: "_blank" }));
    start = found.index + whole.length;
  }
  parts.push(text.slice(start));
  return parts;
}

function lines(texts) {
  return texts.flatMap((text, number) => (number ? [make("br"), ...inline(text)] : inline(text)));
}

// Markdown as models write it, made into elements; nothing that a model says is ever parsed as HTML.
function markdown(text) {
  const blocks = [];
  const rest = text.split("\n");
  const kinds = [/^\s*[-*•]\s+/, /^\s*\d+[.)]\s+/, /^>\s?/];
  const kindOf = (line) => kinds.findIndex((kind) => kind.test(line));
  while (rest.length) {
    const line = rest.shift();
    const fence = line.match(/^\s*(```|~~~)/);
    const heading = line.match(/^#{1,6}\s+(.*)/);
    const kind = kindOf(line);
    if (fence) {
      const code = [];
      while (rest.length && !rest[0].trimStart().startsWith(fence[1])) code.push(rest.shift());
      rest.shift();
      blocks.push(make("pre", { tabIndex: 0 }, make("code", { textContent: code.join("\n") })));
    } else if (heading) {
      blocks.push(make("h3", {}, ...inline(heading[1])));
    } else if (kind >= 0) {
      const items = [line];
      while (rest.length && kindOf(rest[0]) === kind) items.push(rest.shift());
      const texts = items.map((item) => item.replace(kinds[kind], ""));
      if (kind === 2) {
        blocks.push(make("blockquote", {}, ...lines(texts)));
      } else {
        const list = make(kind ? "ol" : "ul", {}, ...texts.map((item) => make("li", {}, ...inline(item))));
        if (kind) list.start = parseInt(line, 10);
        blocks.push(list);
      }
    } else if (line.trim()) {
      const texts = [line];
      while (rest.length && rest[0].trim() && kindOf(rest[0]) < 0 && !/^(\s*(```|~~~)|#{1,6}\s)/.test(rest[0])) {
        texts.push(rest.shift());
      }
      blocks.push(make("p", {}, ...lines(texts)));
    }
  }
  return blocks;
}

// ---- the conversation ----------------------------------------------------------------------------------------------

let model = null;
let busy = null; // what stops the answer under way
let messages = []; // {role, content, stats}

function show() {
  at("hello").hidden = messages.length > 0;
  at("messages").replaceChildren(...messages.map(shown));
  remember();
}

function shown(message, number) {
  const item = make("li", { className: `message ${message.role}` });
  const body = make("div", { className: "body" });
  item.append(body);
  if (message.role === "assistant") {
    body.replaceChildren(...markdown(message.content));
    const copy = make("button", { textContent: "Copy", onclick: () => copied(copy, message.content) });
    const below = make("div", { className: "below" }, copy);
    if (number === messages.length - 1) {
      below.append(make("button", { textContent: "Regenerate", id: "regenerate", onclick: regenerate }));
    }
    if (message.stats) below.append(make("span", { textContent: message.stats }));
    item.append(below);
  } else {
    body.textContent = message.content;
  }
  return item;
}

async function copied(button, text) {
  await navigator.clipboard.writeText(text);
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1200);
}

function remember() {
  sessionStorage.setItem("messages", JSON.stringify(messages));
}

function isAtEnd() {
  const box = at("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function toEnd() {
  at("scroll").scrollTop = at("scroll").scrollHeight;
}

function request() {
  const form = new FormData(at("sampling"));
  const number = (name) => Number(form.get(name));
  const said = messages.filter(({ role }) => role === "user" || role === "assistant");
  const sent = said.map(({ role, content }) => ({ role, content }));
  const system = form.get("system").trim();
  if (system) sent.unshift({ role: "system", content: system });
  const seed = form.get("seed").trim();
  return {
    model: model.id, messages: sent, stream: true, stream_options: { include_usage: true },
    temperature: number("temperature"), top_p: number("top_p"), min_p: number("min_p"), top_k: number("top_k"),
    repetition_penalty: number("repetition_penalty"), max_tokens: number("max_tokens"),
    ...(seed ? { seed: Number(seed) } : {}),
  };
}

async function answer() {
  if (busy || !model) return;
  busy = new AbortController();
  setBusy(true);
  const before = structuredClone(messages);
  const message = { role: "assistant", content: "", stats: "" };
  messages.push(message);
  show();
  toEnd();
  const item = at("messages").lastElementChild;
  item.classList.add("busy");
  let drawing = 0;
  const draw = () => {
    drawing = 0;
    const follow = isAtEnd();
    item.firstElementChild.replaceChildren(...markdown(message.content));
    if (follow) toEnd();
  };
  try {
    await receive(message, () => { drawing ||= requestAnimationFrame(draw); });
  } catch (error) {
    message.stats = "stopped";
    if (!message.content) messages.splice(0, messages.length, ...before); // turns that were dropped in vain too
    if (error.name !== "AbortError") messages.push({ role: "error", content: error.message });
  } finally {
    cancelAnimationFrame(drawing);
    busy = null;
    setBusy(false);
    show();
    toEnd();
  }
}

// One answer; where the conversation outgrew the context, its oldest turn is dropped and the rest sent again.
async function receive(message, draw) {
  const started = performance.now();
  let first = 0;
  const controller = busy;
  messages.pop();
  const body = JSON.stringify(request());
  messages.push(message);
  const got = await call("/v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body, signal: controller.signal,
  });
  if (!got.ok) {
    const { error } = await got.json().catch(() => ({ error: { message: `the server answered ${got.status}` } }));
    if (error.code === "context_length_exceeded" && dropTurn()) return receive(message, draw);
    throw new Error(error.message);
  }
  for await (const data of events(got)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const text = chunk.choices[0]?.delta?.content;
    if (text) {
      first ||= performance.now();
      message.content += text;
      draw();
    }
    if (chunk.usage) {
      const { completion_tokens: tokens } = chunk.usage;
      const seconds = (performance.now() - first) / 1000;
      const speed = tokens > 1 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s · ` : "";
      message.stats = `${tokens} tokens · ${speed}first after ${((first - started) / 1000).toFixed(2)} s`;
    }
  }
  throw new Error("the connection ended before the answer did");
}

function dropTurn() {
  const places = messages.map(({ role }, place) => (role === "user" ? place : -1)).filter((place) => place >= 0);
  if (places.length < 2) return false;
  const gone = messages.splice(places[0], places[1] - places[0]);
  if (messages[0]?.role !== "note") messages.unshift({ role: "note", content: "", turns: 0 });
  messages[0].turns += gone.length;
  messages[0].content = `${messages[0].turns} oldest messages no longer fit the context and were dropped.`;
  return true;
}

function setBusy(is) {
  at("stop").hidden = !is;
  at("send").hidden = is;
  at("status").textContent = is ? "Answering …" : "";
  if (!is && matchMedia("(hover: hover)").matches) at("text").focus();
}

function send(text) {
  if (busy || !model || !text.trim()) return;
  messages = messages.filter(({ role }) => role !== "error");
  messages.push({ role: "user", content: text.trim() });
  at("text").value = "";
  grow();
  answer();
}

function regenerate() {
  if (busy) return;
  while (messages.length && messages.at(-1).role !== "user") messages.pop();
  if (messages.length) answer();
}

function grow() {
  const text = at("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  at("send").disabled = !model || !text.value.trim();
}

function save(name, kind, content) {
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type: kind })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function exported(form) {
  const said = messages.filter(({ role }) => role === "user" || role === "assistant");
  const name = `${model?.id ?? "conversation"}-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}`;
  if (form === "json") {
    const { messages: sent, model: id, ...sampling } = request();
    const facts = { model: id, digest: model?.mobillama.digest, sampling, messages: sent };
    save(`${name}.json`, "application/json", `${JSON.stringify(facts, null, 2)}\n`);
  } else {
    const parts = said.map(({ role, content }) => `**${role === "user" ? "You" : model.id}**\n\n${content}\n`);
    save(`${name}.md`, "text/markdown", parts.join("\n"));
  }
}

// ---- the model -----------------------------------------------------------------------------------------------------

const short = (number) =>
  number >= 1e9 ? `${(number / 1e9).toFixed(2)} B` : number >= 1e6 ? `${Math.round(number / 1e6)} M` : number.toLocaleString("en");

async function findModel() {
  for (;;) {
    const got = await call("/v1/models").catch(() => null);
    if (got?.ok) {
      [model] = (await got.json()).data;
      break;
    }
    await new Promise((resolve) => setTimeout(resolve, 700));
  }
  const its = model.mobillama;
  document.title = `${model.id} · MobiLlama`;
  at("hello-name").textContent = model.id;
  const size = its.parameters ? `${short(its.parameters)} parameters · ` : "";
  at("hello-facts").textContent = its.has_chat_template
    ? `${size}${its.number_format} · answers from this machine`
    : `${size}${its.number_format} · pre-trained only: it continues what you write`;
  at("ideas").hidden = !its.has_chat_template;
  const rows = {
    Parameters: its.parameters ? its.parameters.toLocaleString("en") : "not stated",
    Quantization: its.number_format,
    "In memory": `${(its.weight_bytes / 2 ** 20).toFixed(0)} MiB`,
    Context: `${its.context_length.toLocaleString("en")} tokens`,
    Vocabulary: its.vocabulary.toLocaleString("en"),
    Engine: its.engine,
    "At once": `${its.slots} requests`,
    "Chat template": its.has_chat_template ? "its own" : "none",
    Weights: its.digest,
  };
  at("facts").replaceChildren(...Object.entries(rows).flatMap(([name, value]) => [
    make("dt", { textContent: name }),
    make("dd", { textContent: value, className: name === "Weights" ? "digest" : "" }),
  ]));
  grow();
}

// ---- a run ---------------------------------------------------------------------------------------------------------

const SVG = "http:" + "//www.w3.org/2000/svg";
const draw = (tag, facts, text = "") => {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(facts)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
};

const tidy = (value) => (Math.abs(value) >= 1000 ? `${(value / 1000).toPrecision(3)} k` : Number(value.toPrecision(3)).toString());

function curve(name, points) {
  const [wide, high, left, low] = [480, 210, 44, 24];
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y0 === y1) [y0, y1] = [y0 - 1, y1 + 1];
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (wide - left - 8);
  const py = (y) => 12 + (1 - (y - y0) / (y1 - y0)) * (high - low - 12);
  const picture = draw("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `${name} over steps` });
  for (let part = 0; part <= 3; part += 1) {
    const y = y0 + ((y1 - y0) * part) / 3;
    picture.append(
      draw("line", { class: "grid", x1: left, x2: wide - 8, y1: py(y), y2: py(y) }),
      draw("text", { x: left - 8, y: py(y) + 4, "text-anchor": "end" }, tidy(y)),
    );
  }
  picture.append(
    draw("text", { x: left, y: high - 4 }, `step ${x0.toLocaleString("en")}`),
    draw("text", { x: wide - 8, y: high - 4, "text-anchor": "end" }, `step ${x1.toLocaleString("en")}`),
    draw("path", { class: "line", d: points.map(([x, y], n) => `${n ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("") }),
    draw("circle", { class: "dot", cx: px(points.at(-1)[0]), cy: py(points.at(-1)[1]), r: 3.5 }),
  );
  const caption = make("figcaption", {}, make("strong", { textContent: name }), make("span", { textContent: `last ${tidy(points.at(-1)[1])}` }));
  return make("figure", { className: "curve" }, caption, picture);
}

async function findRun() {
  const got = await call("/run").catch(() => null);
  if (!got?.ok) return;
  const run = await got.json();
  at("tab-run").hidden = false;
  const box = at("run");
  const facts = [
    run.steps ? `${run.steps.toLocaleString("en")} steps` : "no steps yet",
    ...(run.tokens ? [`${short(run.tokens)} tokens`] : []),
    `${run.checkpoints.length} checkpoints`,
  ];
  box.replaceChildren(make("h1", { textContent: run.name }), make("p", { className: "soft", textContent: facts.join(" · ") }));
  if (run.has_report && !sessionStorage.getItem("token")) {
    box.append(make("iframe", { src: "/run/report.html", title: "The run's report", sandbox: "allow-scripts" }));
  }
  const curves = Object.entries(run.curves).filter(([, points]) => points.length > 1);
  box.append(make("div", { className: "curves" }, ...curves.map(([name, points]) => curve(name, points))));
  const rows = run.evaluations.flatMap(({ suite, model: name, scores }) =>
    Object.entries(scores).map(([task, score]) => [suite, name, task, typeof score === "number" ? tidy(score) : JSON.stringify(score)]));
  if (rows.length) {
    const head = make("tr", {}, ...["Suite", "Model", "Task", "Score"].map((text) => make("th", { textContent: text })));
    const body = rows.map((row) => make("tr", {}, ...row.map((text) => make("td", { textContent: text }))));
    box.append(make("h2", { textContent: "Evaluations" }), make("div", { className: "table" }, make("table", {}, head, ...body)));
  }
  if (run.recipe) box.append(make("h2", { textContent: "Recipe" }), make("pre", { textContent: run.recipe, tabIndex: 0 }));
}

function openTab(name) {
  for (const tab of ["chat", "run"]) {
    at(tab).hidden = tab !== name;
    at(`tab-${tab}`).ariaSelected = String(tab === name);
    at(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
  }
  at("panel").hidden = name === "run";
  at("panel-toggle").hidden = name === "run";
}

// ---- what was chosen -----------------------------------------------------------------------------------------------

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}

function showPanel(open) {
  at("panel").classList.toggle("open", open);
  at("shade").hidden = !open;
  at("panel-toggle").ariaExpanded = String(open);
}

function showValues() {
  for (const input of at("sampling").querySelectorAll("input[type=range]")) {
    input.closest("label").querySelector("output").value = Number(input.value).toFixed(2);
  }
}

function keepSampling() {
  showValues();
  localStorage.setItem("sampling", JSON.stringify(Object.fromEntries(new FormData(at("sampling")))));
}

function stored(place, key, otherwise) {
  try {
    return JSON.parse(place.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

setTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
messages = stored(sessionStorage, "messages", []);
for (const [name, value] of Object.entries(stored(localStorage, "sampling", {}))) {
  const field = at("sampling").elements[name];
  if (field) field.value = value;
}
showValues();
show();
toEnd();

at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(at("text").value); });
at("text").addEventListener("input", grow);
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(at("text").value);
  }
});
at("stop").addEventListener("click", () => busy?.abort());
at("ideas").addEventListener("click", (event) => { if (event.target.tagName === "BUTTON") send(event.target.textContent); });
at("sampling").addEventListener("input", keepSampling);
at("sampling").addEventListener("submit", (event) => event.preventDefault());
at("sampling").addEventListener("reset", () => setTimeout(keepSampling));
at("export-md").addEventListener("click", () => exported("md"));
at("export-json").addEventListener("click", () => exported("json"));
at("theme").addEventListener("click", () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", name);
  setTheme(name);
});
at("panel-toggle").addEventListener("click", () => {
  if (matchMedia("(min-width: 1021px)").matches) at("panel").classList.toggle("shut");
  else showPanel(!at("panel").classList.contains("open"));
});
at("shade").addEventListener("click", () => showPanel(false));
const begin = () => { busy?.abort(); messages = []; show(); at("text").focus(); };
at("new").addEventListener("click", begin);
for (const name of ["chat", "run"]) at(`tab-${name}`).addEventListener("click", () => openTab(name));
document.querySelector(".tabs").addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key) || at("tab-run").hidden) return;
  const name = at("chat").hidden ? "chat" : "run";
  openTab(name);
  at(`tab-${name}`).focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (at("panel").classList.contains("open")) showPanel(false);
    else busy?.abort();
  } else if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    begin();
  }
});
findModel().then(findRun);
