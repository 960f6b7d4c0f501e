// GET /status once a second, while the page is seen; less often while it fails.

import { getJson } from "./server.js";

const INTERVAL_MS = 1000;
const LONGEST_MS = 15000;
const TIMEOUT_MS = 5000;

// onStatus: takes what /status says. onTrouble: takes an error, of either, and the milliseconds until the next try.
export async function watchStatus(onStatus, onTrouble) {
  let waitMs = INTERVAL_MS;
  for (;;) {
    if (document.hidden) await pause(0);
    try {
      onStatus(await getJson("status", { timeoutMs: TIMEOUT_MS }));
      waitMs = INTERVAL_MS;
    } catch (error) {
      waitMs = Math.min(2 * waitMs, LONGEST_MS);
      onTrouble(error, waitMs);
    }
    await pause(waitMs);
  }
}

// Ends after that time, at once where the page comes to be seen, and never while it is not.
function pause(ms) {
  return new Promise((resolve) => {
    const timer = setTimeout(end, ms);
    document.addEventListener("visibilitychange", end);
    function end() {
      if (document.hidden) return;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", end);
      resolve();
    }
  });
}
