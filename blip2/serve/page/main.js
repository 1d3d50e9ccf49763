// The page: a picture comes in, its words come out. What is shown always belongs to the picture that is shown.

import * as api from "./api.js";
import { curl, pythonCode } from "./code.js";
import { draw } from "./heat.js";
import * as settings from "./settings.js";

const get = (id) => document.getElementById(id);
const show = (id, shown = true) => (get(id).hidden = !shown);

let model = null; // its name, once known
let picture = null; // { file, url, data, turns, explained, leaving }
let last = null; // the last request, for the code
let lookingAt = null; // the button of the word whose heat is shown

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, action, className = "plain") {
  const element = make("button", className, text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

// For screen readers; not visible.
const announce = (text) => (get("status").textContent = text);

// Errors that are sentences are shown; stopping is no error.
function messageOf(error) {
  if (error.name === "AbortError") return null;
  if (error instanceof api.Trouble) return error.message;
  console.error(error);
  return "Something went wrong on this page.";
}

function trouble(text, retry = null) {
  show("trouble", text !== null);
  show("trouble-retry", retry !== null);
  get("trouble-text").textContent = text ?? "";
  get("trouble-retry").onclick = retry && (() => { trouble(null); retry(); });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
  } catch {
    announce("The browser did not allow copying.");
  }
}

// --- the picture ---

function take(file) {
  picture?.leaving.abort();
  if (picture) URL.revokeObjectURL(picture.url);
  picture = {
    file,
    url: URL.createObjectURL(file),
    data: null,
    turns: [],
    explained: new Map(), // the request's fields as JSON -> promise of the explanation
    leaving: new AbortController(),
  };
  last = null;
  trouble(null);
  unlook();
  get("talk").replaceChildren();
  get("picture").src = picture.url;
  show("picture");
  show("unshown", false);
  show("choose", false);
  for (const id of ["shown", "words", "another", "ideas"]) show(id);
  document.body.classList.add("working");
  caption();
}

get("picture").addEventListener("load", ({ target }) => {
  get("frame").style.setProperty("--ratio", target.naturalWidth / target.naturalHeight);
});
get("picture").addEventListener("error", () => {
  show("picture", false);
  show("unshown");
});

function again() {
  picture?.leaving.abort();
  picture = null;
  for (const id of ["shown", "words", "another"]) show(id, false);
  show("choose");
  document.body.classList.remove("working");
  get("file").value = "";
  get("file").focus();
}

function takeFirst(files) {
  const file = [...files][0];
  if (file) take(file);
  return Boolean(file);
}

get("file").addEventListener("change", (event) => takeFirst(event.target.files));
get("another").addEventListener("click", again);

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (!takeFirst(event.dataTransfer.files)) announce("That was no file.");
});
document.addEventListener("paste", (event) => {
  if (takeFirst(event.clipboardData.files)) event.preventDefault();
});

for (const example of document.querySelectorAll("[data-example]")) {
  example.addEventListener("click", async () => {
    const name = example.dataset.example;
    try {
      const response = await fetch(`page/examples/${name}`);
      take(new File([await response.blob()], name, { type: "image/jpeg" }));
    } catch {
      announce("The server cannot be reached.");
    }
  });
}

// --- its caption ---

async function caption() {
  const mine = picture;
  mine.captioning?.abort();
  const leaving = (mine.captioning = new AbortController());
  mine.leaving.signal.addEventListener("abort", () => leaving.abort());
  trouble(null);
  get("caption").replaceChildren();
  get("alternatives").replaceChildren();
  show("caption-tools", false);
  show("caption-hint", false);
  show("caption-warning", false);
  get("waiting").textContent = "Looking at the picture …";
  const fields = settings.captionFields();
  remember("caption", fields);
  try {
    const reply = await api.post("caption", mine.file, fields, leaving.signal);
    if (mine !== picture) return;
    const captions = different(reply.captions.toSorted((a, b) => b.score - a.score));
    get("alternatives").replaceChildren(...captions.toSorted((a, b) => b.logprob - a.logprob).map(alternative));
    showCaption(captions[0].text);
    const warning = (reply.warnings ?? []).map((reason) => `It may well be wrong: ${reason}.`).join(" ");
    get("caption-warning").textContent = warning;
    show("caption-warning", Boolean(warning));
    announce(`The caption: ${captions[0].text}${warning && `. ${warning}`}`);
  } catch (error) {
    const text = messageOf(error);
    if (mine === picture && text !== null) trouble(text, caption);
  } finally {
    if (mine === picture && leaving === mine.captioning) get("waiting").textContent = "";
    showCode(); // a key may have been entered
  }
}

// Sampling may give the same text several times.
function different(captions) {
  const seen = new Set();
  return captions.filter(({ text }) => !seen.has(text) && seen.add(text));
}

function showCaption(text) {
  unlook();
  const shown = text || "The model wrote nothing.";
  get("caption").replaceChildren(...(text ? wordButtons(text, { text }) : [shown]));
  show("caption-tools");
  show("caption-hint", Boolean(text));
  get("caption").dataset.text = text;
  for (const choice of get("alternatives").querySelectorAll("button")) {
    choice.setAttribute("aria-current", String(choice.textContent === text));
  }
}

function alternative({ text, logprob }) {
  const item = make("li");
  const share = make("span", "share", percent(Math.exp(logprob)));
  share.title = "the probability with which the model writes exactly this text";
  const choose = button(text, () => showCaption(text), "alternative");
  item.append(choose, share);
  return item;
}

// Two digits, so that a small probability is not shown as none; rounded down, so that all together stay within 100.
function percent(share) {
  if (share < 1e-4) return "under 0.01 %";
  const scale = 10 ** Math.max(0, 1 - Math.floor(Math.log10(100 * share)));
  return `${Math.floor(100 * share * scale) / scale} %`;
}

get("caption-again").addEventListener("click", caption);
get("caption-copy").addEventListener("click", () => copy(get("caption").dataset.text));

// --- where it looked ---

// Text as words that can be chosen; `target` is what the explanation is about: {text} or {question, answer, turns}.
function wordButtons(text, target) {
  const words = text.trim().split(/\s+/).flatMap((word, i) => {
    const element = button(word, () => look(element, i, target), "word");
    element.setAttribute("aria-pressed", "false");
    return [" ", element];
  });
  return words.slice(1);
}

function explanation(mine, target) {
  const name = JSON.stringify(target);
  if (!mine.explained.has(name)) {
    const reply = target.turns
      ? api.postJson("explain", { image: mine.data, ...target }, mine.leaving.signal)
      : api.post("explain", mine.file, target, mine.leaving.signal);
    reply.catch(() => mine.explained.delete(name));
    mine.explained.set(name, reply);
  }
  return mine.explained.get(name);
}

async function look(word, place, target) {
  const mine = picture;
  if (word === lookingAt) return unlook();
  unlook();
  lookingAt = word;
  word.setAttribute("aria-pressed", "true");
  show("where");
  const text = word.textContent.replace(/[.,]$/, "");
  get("where-text").textContent = `Finding where “${text}” comes from …`;
  try {
    const reply = await explanation(mine, target);
    if (word !== lookingAt) return;
    showHeat(reply.words[place].heat, `Where “${text}” comes from`);
    mine.target = target;
    const [layers, heads, queries] = reply.attention_shape;
    for (const [id, count] of [["layer", layers], ["head", heads], ["query", queries]]) get(id).max = count;
  } catch (error) {
    const message = messageOf(error);
    if (word !== lookingAt || message === null) return;
    unlook();
    trouble(message, () => look(word, place, target));
  }
}

function showHeat(grid, text) {
  draw(get("heat"), grid);
  show("heat");
  get("frame").classList.add("heated");
  get("where-text").textContent = text;
  get("frame").scrollIntoView({ block: "nearest" });
  announce(`${text}: most from ${region(grid)}.`);
}

// The warmest place in words.
function region(grid) {
  const peak = Math.max(...grid.flat());
  const row = grid.findIndex((values) => values.includes(peak));
  const third = (i, n, names) => names[Math.min(2, Math.floor((3 * (i + 0.5)) / n))];
  const up = third(row, grid.length, ["the top", "the middle", "the bottom"]);
  return `${up} ${third(grid[row].indexOf(peak), grid[row].length, ["left", "centre", "right"])}`;
}

function unlook() {
  lookingAt?.setAttribute("aria-pressed", "false");
  lookingAt = null;
  show("heat", false);
  show("where", false);
  get("frame").classList.remove("heated");
}

get("plain").addEventListener("click", () => {
  const word = lookingAt;
  unlook();
  word?.focus();
});
for (const id of ["layer", "head", "query"]) {
  get(id).addEventListener("input", () => (get(`${id}-now`).value = get(id).value));
}
get("raw-show").addEventListener("click", async () => {
  const [mine, word] = [picture, lookingAt];
  const [layer, head, query] = ["layer", "head", "query"].map((id) => Number(get(id).value));
  const place = { layer: layer - 1, head: head - 1, query: query - 1 };
  try {
    const reply = await explanation(mine, { ...mine.target, ...place });
    if (mine !== picture || word !== lookingAt) return;
    showHeat(reply.attention, `What query ${query} looks at in layer ${layer}, head ${head}`);
  } catch (error) {
    const text = messageOf(error);
    if (text !== null) trouble(text);
  }
});

// --- asking ---

let answering = null; // the turn being answered: { question, text, leaving, element }

get("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = get("ask-text").value.trim();
  if (!question || answering) return;
  get("ask-text").value = "";
  ask(question);
});
for (const idea of get("ideas").children) idea.addEventListener("click", () => !answering && ask(idea.textContent));
get("ask-stop").addEventListener("click", () => answering?.leaving.abort());

async function ask(question) {
  const mine = picture;
  const turn = { question, text: "", before: [...mine.turns], leaving: new AbortController(), element: make("article", "turn") };
  const answer = make("p", "answer waiting", "Thinking …");
  turn.element.append(make("p", "question", question), answer);
  get("talk").querySelectorAll(".retry").forEach((retry) => retry.remove());
  get("talk").append(turn.element);
  show("ideas", false);
  answering = turn;
  show("ask-stop");
  show("ask-send", false);
  mine.leaving.signal.addEventListener("abort", () => turn.leaving.abort());
  remember("ask", { question, ...settings.askFields() });
  let why = null;
  try {
    mine.data ??= await api.dataUrl(mine.file);
    model ??= await api.modelName();
    const pieces = api.chat(model, messages(mine, question), settings.chatOptions(), turn.leaving.signal);
    for await (const piece of pieces) {
      turn.text += piece;
      answer.textContent = turn.text;
      answer.classList.remove("waiting");
    }
    if (turn.text) mine.turns.push({ question, answer: turn.text });
  } catch (error) {
    why = error.name === "AbortError" ? "Stopped." : messageOf(error);
  }
  if (answering === turn) {
    answering = null;
    show("ask-stop", false);
    show("ask-send");
    showCode();
  }
  if (mine === picture) finish(turn, answer, why);
}

// The conversation as the server's API has it: the picture comes with the first question.
function messages(mine, question) {
  const turns = [...mine.turns, { question, answer: null }];
  return turns.flatMap(({ question: text, answer }, i) => {
    const part = { type: "text", text };
    const content = i ? text : [part, { type: "image_url", image_url: { url: mine.data } }];
    return answer === null ? [{ role: "user", content }] : [{ role: "user", content }, { role: "assistant", content: answer }];
  });
}

function finish(turn, answer, why) {
  const text = turn.text.trim();
  answer.classList.remove("waiting");
  if (text && why === null) answer.replaceChildren(...wordButtons(text, { question: turn.question, answer: text, turns: turn.before }));
  else answer.textContent = text || (why === null ? "The model wrote nothing." : "");
  answer.hidden = answer.textContent === "";
  const tools = make("p", "tools");
  if (why !== null) tools.append(make("span", "why", why));
  if (text) tools.append(button("Copy", () => copy(text)));
  const retry = button("Again", () => {
    turn.element.remove();
    const at = picture.turns.findIndex(({ question, answer }) => question === turn.question && answer === turn.text);
    if (at >= 0) picture.turns.splice(at, 1);
    ask(turn.question);
  }, "plain retry");
  tools.append(retry);
  turn.element.append(tools);
}

// --- settings, and the same from code ---

settings.watch(() => picture && !answering && caption());

function remember(path, fields) {
  last = { path, fields, file: picture.file.name || "picture" };
  showCode();
}

function showCode() {
  if (!last) return;
  const write = get("code-python").getAttribute("aria-pressed") === "true" ? pythonCode : curl;
  get("code-text").textContent = write(last, document.baseURI, api.hasKey());
}

for (const [id, other] of [["code-curl", "code-python"], ["code-python", "code-curl"]]) {
  get(id).addEventListener("click", () => {
    get(id).setAttribute("aria-pressed", "true");
    get(other).setAttribute("aria-pressed", "false");
    showCode();
  });
}
get("code-copy").addEventListener("click", () => copy(get("code-text").textContent));

api.modelName().then(
  (name) => {
    model = name;
    get("model").textContent = name;
  },
  () => (get("model").textContent = "the model is not ready"),
);
