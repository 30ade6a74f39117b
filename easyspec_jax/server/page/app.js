// The conversation: sends it, shows the answer as it grows, and keeps it for a reload.

import { renderMarkdown, renderPlain } from "./markdown.js";
import { Speculation } from "./speculation.js";

const $ = (id) => document.getElementById(id);
const KEPT = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed", "display", "tint"];

const state = {
  model: null, // what /v1/models says
  messages: [], // { role, text, drafted: for each character whether it was drafted, note }
  running: null, // the AbortController of the answer that grows
  latest: null, // what the latest answer was asked with, for the comparison
};

// ---- the server ----

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function connect() {
  const response = await fetch("v1/models", { headers: headers() });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  state.model = answer.data[0];
  const { method, num_speculative_tokens: levels } = state.model.easyspec;
  const way = method === "vanilla" ? "no draft" : `${method}, ${levels} levels`;
  $("model").textContent = `${state.model.id} · ${way}`;
  if (state.model.easyspec.bundled && localStorage.getItem("display") === null) {
    $("display").value = "plain"; // the bundled pair writes Python, not Markdown
    $("input").placeholder = "def read_lines(path):";
  }
  idle().show();
}

function idle() {
  const { method, num_speculative_tokens: levels } = state.model.easyspec;
  return new Speculation(method === "vanilla" ? 0 : levels);
}

// Send a body and yield the data of each server-sent event.
async function* stream(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify({ ...body, stream: true }), signal,
  });
  if (!response.ok) {
    const text = await response.text();
    throw new Error(errorOf(text) ?? `The server answered ${response.status}.`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function errorOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return null;
  }
}

function request() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const system = $("system").value.trim();
  const turns = state.messages.map(({ role, text }) => ({ role, content: text }));
  return {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
}

// ---- an answer ----

async function ask(text) {
  state.messages.push({ role: "user", text, drafted: [] });
  const body = request();
  const answer = { role: "assistant", text: "", drafted: [], note: "" };
  state.messages.push(answer);
  showMessages();
  const growing = new Speculation(idle().levels);
  state.running = new AbortController();
  state.latest = null;
  busy(true);
  say("The answer has begun.");
  let ending = "complete";
  try {
    for await (const chunk of stream({ ...body, easyspec: { trace: true } }, state.running.signal)) {
      grow(answer, growing, chunk);
    }
    state.latest = { body, growing };
  } catch (error) {
    ending = error.name === "AbortError" ? "stopped" : error.message;
  }
  state.running = null;
  busy(false);
  end(answer, growing, ending);
}

function grow(answer, growing, chunk) {
  const [choice] = chunk.choices;
  const gain = chunk.easyspec;
  if (gain?.stats) {
    answer.speed = gain.stats.tokens_per_second;
    return;
  }
  if (!gain) { // held back to the end, or the chunk with the role
    put(answer, choice?.delta?.content ?? "", false);
    return;
  }
  growing.add(gain);
  const { forced, accepted } = gain; // a grammar's tokens come first, then accepted ones
  gain.pieces.forEach((piece, i) => put(answer, piece, i >= forced && i < forced + accepted));
  schedule(() => {
    showText(answer);
    growing.show();
  });
}

function put(answer, text, drafted) {
  answer.text += text;
  for (let i = 0; i < text.length; i += 1) answer.drafted.push(drafted);
}

function end(answer, growing, ending) {
  const failed = ending !== "complete" && ending !== "stopped";
  if (!answer.text && ending !== "complete") {
    state.messages.splice(-2); // nothing was said: the question may be changed and sent again
    $("input").value ||= lastQuestion;
  }
  if (growing.rounds.length) {
    const speed = answer.speed ?? growing.speed;
    answer.note = `${growing.tokens + 1} tokens · ${growing.perRound.toFixed(2)} a round · ${speed.toFixed(1)} tokens/s`;
  }
  if (ending === "stopped") answer.note += answer.note ? " · stopped" : "stopped";
  schedule(() => {
    showMessages();
    if (growing.rounds.length) growing.show();
    if (failed) showError(ending);
  });
  keep();
  $("compare").disabled = !(state.latest && state.model.easyspec.plain);
  $("comparison").textContent = state.model.easyspec.plain
    ? "" : "Start the server with --compare to measure plain decoding.";
  say(failed ? ending : `The answer is ${ending}. ${answer.note}`);
  $("input").focus({ preventScroll: true });
}

let lastQuestion = "";

// Decode the latest answer's prompt once more without a draft, for as many tokens.
async function compare() {
  const { body, growing } = state.latest;
  state.running = new AbortController();
  busy(true);
  $("comparison").textContent = "Decoding plainly…";
  try {
    const plain = new Speculation(0);
    let stats = null;
    const asked = { ...body, max_tokens: growing.tokens + 1, easyspec: { trace: true, plain: true } };
    for await (const chunk of stream(asked, state.running.signal)) {
      if (chunk.easyspec?.stats) stats = chunk.easyspec.stats;
      else if (chunk.easyspec) {
        plain.add(chunk.easyspec);
        $("comparison").textContent = `Decoding plainly… ${plain.tokens} tokens`;
      }
    }
    const speed = state.messages.at(-1).speed ?? growing.speed;
    const ratio = speed / stats.tokens_per_second;
    $("comparison").textContent =
      `${speed.toFixed(1)} tokens/s with the draft, ${stats.tokens_per_second.toFixed(1)} without: ${ratio.toFixed(2)} times.`;
  } catch (error) {
    $("comparison").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  }
  state.running = null;
  busy(false);
}

// ---- what is shown ----

// One drawing a frame, however many chunks come.
let pending = null;
function schedule(drawing) {
  if (pending === null) requestAnimationFrame(() => { pending(); pending = null; });
  pending = drawing;
}

function showMessages() {
  $("welcome").hidden = state.messages.length > 0;
  $("messages").replaceChildren(...state.messages.map(element));
  toEnd();
}

function element(message) {
  const item = document.createElement("li");
  item.className = `message ${message.role}`;
  const who = document.createElement("h2");
  who.textContent = message.role === "user" ? "You" : "Model";
  const text = document.createElement("div");
  message.shown = text;
  item.append(who, text);
  showText(message);
  if (message.note) item.append(footer(message));
  return item;
}

function footer(message) {
  const line = document.createElement("footer");
  const copy = document.createElement("button");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(message.text);
    say("Copied.");
  });
  line.append(message.note, copy);
  return line;
}

function showText(message) {
  const markdown = message.role === "assistant" && $("display").value === "markdown";
  const growing = state.running && message === state.messages.at(-1);
  const followed = atEnd();
  message.shown.className = ["text", markdown ? "" : "plain", $("tint").checked ? "tinted" : "", growing ? "growing" : ""]
    .filter(Boolean).join(" ");
  (markdown ? renderMarkdown : renderPlain)(message.shown, message);
  if (followed) toEnd();
}

function showError(message) {
  const line = document.createElement("p");
  line.className = "error";
  line.textContent = message;
  const item = document.createElement("li");
  item.append(line);
  $("messages").append(item);
  $("welcome").hidden = true;
  toEnd();
}

// Follow the text, unless the reader has scrolled up.
function atEnd() {
  const { scrollTop, clientHeight, scrollHeight } = $("scroll");
  return scrollHeight - scrollTop - clientHeight < 60;
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("new").disabled = is;
  $("compare").disabled = is || !(state.latest && state.model?.easyspec.plain);
  $("messages").setAttribute("aria-busy", is);
}

function say(text) {
  $("status").textContent = text;
}

function fit() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

// ---- what is kept ----

function keep() {
  const messages = state.messages.map(({ role, text, drafted, note }) => (
    { role, text, note, drafted: drafted.map(Number).join("") }
  ));
  sessionStorage.setItem("messages", JSON.stringify(messages));
}

function remember() {
  for (const id of KEPT) {
    const value = localStorage.getItem(id);
    if (value === null) continue;
    if ($(id).type === "checkbox") $(id).checked = value === "true";
    else $(id).value = value;
  }
  $("key").value = sessionStorage.getItem("key") ?? "";
  const kept = JSON.parse(sessionStorage.getItem("messages") ?? "[]");
  state.messages = kept.map((message) => ({ ...message, drafted: [...message.drafted].map((flag) => flag === "1") }));
  showMessages();
}

// ---- events ----

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (!text.trim() || state.running || !state.model) return;
  lastQuestion = text;
  $("input").value = "";
  fit();
  ask(text);
});

$("input").addEventListener("input", fit);
$("input").addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter chooses it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});
$("stop").addEventListener("click", () => state.running?.abort());

$("new").addEventListener("click", () => {
  state.messages = [];
  state.latest = null;
  keep();
  showMessages();
  idle().show();
  busy(false);
  $("comparison").textContent = "";
  say("A new conversation.");
  $("input").focus();
});

$("compare").addEventListener("click", compare);

$("toggle").addEventListener("click", () => {
  const open = $("panel").classList.toggle("open");
  $("toggle").setAttribute("aria-expanded", open);
  $("toggle").textContent = open ? "Close" : "Details";
});

$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("change", ({ target }) => {
  if (target.id === "key") {
    sessionStorage.setItem("key", target.value);
    start();
    return;
  }
  localStorage.setItem(target.id, target.type === "checkbox" ? target.checked : target.value);
  if (target.id === "display" || target.id === "tint") showMessages();
});

async function start() {
  try {
    await connect();
    showMessages();
  } catch (error) {
    $("model").textContent = error.message;
  }
}

remember();
start();
