// The page: the chat box, and what /status says beside it.

import { startChat } from "./chat.js";
import { byId, count, longDuration } from "./dom.js";
import { Formation } from "./formation.js";
import { ServerError, Unreachable } from "./server.js";
import { watchStatus } from "./status.js";

const MEANINGS = {
  draining: "The server is draining: it finishes what runs and refuses what is new.",
  failed: "The formation has failed: no token can be made until the server is started again.",
};

const formation = new Formation(byId("formation"));

function onStatus(status) {
  formation.show(status);
  document.title = `Phalanx · ${status.model}`;
  byId("model").textContent = status.model;
  byId("layout").textContent = status.layout;
  byId("uptime").textContent = `up ${longDuration(status.uptime_s)}`;
  state(status.state, MEANINGS[status.state]);
}

function onTrouble(error, retryMs) {
  const again = `Trying again in ${count(retryMs / 1000)} s.`;
  if (error instanceof Unreachable) state("no answer", `The server does not answer: ${error.message}. ${again}`);
  else if (error instanceof ServerError) state("no answer", `The server refuses /status: ${error.message}. ${again}`);
  else state("no answer", `What /status says cannot be shown: ${error.message}. ${again}`);
}

function state(name, notice = "") {
  byId("state").textContent = name;
  byId("state").dataset.state = name;
  byId("formation").classList.toggle("stale", name === "no answer"); // what is still drawn was so, and may not be now
  byId("notice").textContent = notice;
  byId("notice").hidden = !notice;
}

startChat();
watchStatus(onStatus, onTrouble);
