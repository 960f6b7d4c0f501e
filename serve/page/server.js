// Requests to the server that the page came from, with the user's API key where the server wants one.

import { byId } from "./dom.js";

const KEY = "phalanx-api-key";

// The server refused, in its own words.
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Nothing answered, or the answer broke off.
export class Unreachable extends Error {}

// A response that is ok. While the server answers 401, the user is asked for a key and the request is sent again.
export async function request(path, { signal, timeoutMs, body } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const limits = [signal, timeoutMs && AbortSignal.timeout(timeoutMs)].filter(Boolean);
    const response = await reached(
      fetch(new URL(path, document.baseURI), {
        method: body ? "POST" : "GET",
        headers: {
          ...(body && { "Content-Type": "application/json" }),
          ...(key && { Authorization: `Bearer ${key}` }),
        },
        body: body && JSON.stringify(body),
        cache: "no-store",
        signal: AbortSignal.any(limits),
      }),
      signal,
    );
    if (response.ok) return response;
    const message = await refusal(response);
    if (response.status !== 401) throw new ServerError(response.status, message);
    // Another request may have been given a new key while this one was on its way.
    if (sessionStorage.getItem(KEY) === key) await askForKey(message, signal);
  }
}

export async function getJson(path, options) {
  const response = await request(path, options);
  return reached(response.json(), options?.signal);
}

// What the promise gives; Unreachable where the connection failed, and the abort itself where `signal` asked for it.
export async function reached(promise, signal) {
  try {
    return await promise;
  } catch (error) {
    if (signal?.aborted) throw error;
    if (error.name === "TimeoutError") throw new Unreachable("nothing came within the time limit");
    if (error instanceof TypeError) throw new Unreachable("the connection failed");
    throw error;
  }
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  try {
    const said = JSON.parse(text);
    const message = said.error?.message ?? said.detail;
    if (typeof message === "string") return message;
  } catch {
    // Not JSON: a proxy's page, perhaps. The status says more than its markup would.
  }
  return `HTTP ${response.status} ${response.statusText}`.trim();
}

let asking = null; // the question that is open: every request that lacks the key waits for the same answer

async function askForKey(reason, signal) {
  signal?.throwIfAborted();
  asking ??= new Promise((resolve) => {
    const form = byId("key");
    const field = byId("key-value");
    byId("key-reason").textContent = reason;
    form.hidden = false;
    field.focus();
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value.trim());
      field.value = "";
      form.hidden = true;
      asking = null;
      resolve();
    };
  });
  await Promise.race([asking, aborted(signal)]);
}

function aborted(signal) {
  return new Promise((_, reject) => {
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
