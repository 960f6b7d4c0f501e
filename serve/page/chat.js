// The chat box.

import { Conversation } from "./conversation.js";
import { byId, count, duration, element, rate } from "./dom.js";
import { Unreachable } from "./server.js";

const log = byId("log");
const prompt = byId("prompt");
const hello = log.firstElementChild;

let conversation = new Conversation();
let running = null; // the AbortController of the answer that is being made

export function startChat() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new").addEventListener("click", () => {
    running?.abort();
    conversation = new Conversation();
    log.replaceChildren(hello);
    prompt.focus();
  });
}

async function send() {
  const text = prompt.value.trim();
  if (!text || running) return;
  prompt.value = "";
  hello.remove();
  log.append(message("user", "You", text));
  const answer = new Answer();
  log.append(answer.box);
  log.scrollTop = log.scrollHeight;

  const controller = new AbortController();
  busy(controller);
  try {
    for await (const piece of conversation.ask(text, sampling(), controller.signal)) answer.take(piece);
    answer.end();
  } catch (error) {
    if (controller.signal.aborted) answer.end("stopped");
    else {
      answer.fail(error);
      prompt.value ||= text; // to be sent again
    }
  }
  busy(null);
}

function busy(controller) {
  running = controller;
  log.setAttribute("aria-busy", String(running !== null)); // a screen reader reads an answer once it is whole
  const [shown, hidden] = running ? ["stop", "send"] : ["send", "stop"];
  byId(shown).hidden = false;
  if (document.activeElement === byId(hidden)) (running ? byId(shown) : prompt).focus();
  byId(hidden).hidden = true;
}

// An empty field leaves the choice to the server.
function sampling() {
  const fields = { temperature: byId("temperature"), max_tokens: byId("max-tokens") };
  const given = Object.entries(fields).filter(([, field]) => field.value !== "");
  return Object.fromEntries(given.map(([name, field]) => [name, field.valueAsNumber]));
}

function message(kind, author, ...content) {
  return element("article", { class: `message ${kind}` }, element("h3", {}, author), element("div", { class: "text" }, ...content));
}

// One answer on the page: its text as it comes, then what it took.
class Answer {
  #text = document.createTextNode("");
  #figures = element("p", { class: "figures quiet" }, "waiting for the first token");
  #start = performance.now();
  #first = null;
  #last = null;
  #numPieces = 0;
  #usage = null;
  #finish = null;

  constructor() {
    this.box = message("answer", "Model", this.#text);
    this.box.classList.add("growing");
    this.box.append(this.#figures);
  }

  take({ sent, plain, text, finish, usage }) {
    // Whoever scrolled up to read stays there.
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (sent) this.#start = performance.now();
    if (plain) {
      const note = "This model has no chat template: it continues the text so far, by /v1/completions.";
      this.box.before(element("p", { class: "note" }, note));
    }
    if (text) {
      this.#last = performance.now();
      this.#first ??= this.#last;
      this.#numPieces += 1;
      this.#text.appendData(text);
      this.#figures.textContent = this.#said().join(" · ");
    }
    this.#finish = finish ?? this.#finish;
    this.#usage = usage ?? this.#usage;
    if (follows) log.scrollTop = log.scrollHeight;
  }

  end(how = this.#finish) {
    this.box.classList.remove("growing");
    const endings = { length: "ended at the limit of tokens", stop: null };
    const ending = how in endings ? endings[how] : how;
    this.#figures.textContent = [...this.#said(), ending].filter(Boolean).join(" · ");
  }

  fail(error) {
    this.end(null);
    const text = error instanceof Unreachable ? `The server does not answer: ${error.message}.` : error.message;
    this.box.append(element("p", { class: "error", role: "alert" }, text));
    log.scrollTop = log.scrollHeight;
  }

  #said() {
    const said = [];
    if (this.#first !== null) {
      said.push(`first token after ${duration(this.#first - this.#start)}`);
      const seconds = (this.#last - this.#first) / 1000;
      // Until the server has counted, a piece is taken for a token.
      const perSecond = ((this.#usage?.completion_tokens ?? this.#numPieces) - 1) / seconds;
      if (seconds > 0 && perSecond > 0) said.push(`${this.#usage ? "" : "≈ "}${rate(perSecond)} tokens/s`);
    }
    if (this.#usage) said.push(`${count(this.#usage.prompt_tokens)} prompt + ${count(this.#usage.completion_tokens)} output tokens`);
    return said;
  }
}
