// The picture of the formation: a row for each replica, its stages in order, the ranks of each.

import { count, element, rate } from "./dom.js";
import { Sparkline } from "./sparkline.js";

export class Formation {
  #root;
  #drawn = null; // the ranks that are on the page, as JSON
  #replicas = [];

  constructor(root) {
    this.#root = root;
  }

  // status: as GET /status gives it.
  show(status) {
    const ranks = JSON.stringify(status.ranks);
    if (ranks !== this.#drawn) {
      const grouped = [...groups(status.ranks, "replica")];
      this.#replicas = grouped.map(([number, members]) => new Replica(number, members));
      this.#root.replaceChildren(...this.#replicas.map((replica) => replica.box));
      this.#drawn = ranks;
    }
    for (const replica of this.#replicas) replica.show(status.replicas[replica.number]);
  }
}

class Replica {
  #figures = { running: element("dd"), waiting: element("dd"), tokens_per_s: element("dd") };
  #sparkline = new Sparkline();
  #pages = new Pages();
  #since = element("p", { class: "quiet since" });
  #stages;

  constructor(number, ranks) {
    this.number = number;
    this.#stages = [...groups(ranks, "stage")].map(([stage, members]) => new Stage(stage, members));
    const { running, waiting, tokens_per_s: speed } = this.#figures;
    this.box = element(
      "article", { class: "replica", "aria-label": `Replica ${number}` },
      element(
        "header", {},
        element("h3", {}, `Replica ${number}`),
        element(
          "dl", { class: "now" },
          element("div", {}, element("dt", {}, "running"), running),
          element("div", {}, element("dt", {}, "waiting"), waiting),
          element("div", { class: "speed" }, element("dt", {}, "tokens/s"), speed),
        ),
        this.#sparkline.box,
      ),
      element("ol", { class: "stages" }, ...this.#stages.map((stage) => stage.box)),
      this.#pages.box,
      this.#since,
    );
  }

  show(stats) {
    this.box.classList.toggle("absent", !stats);
    if (!stats) return; // a replica that has failed may have nothing to say
    this.#figures.running.textContent = count(stats.running);
    this.#figures.waiting.textContent = count(stats.waiting);
    this.#figures.tokens_per_s.textContent = rate(stats.tokens_per_s);
    this.#sparkline.add(stats.tokens_per_s);
    this.#stages.forEach((stage, index) => stage.show(stats.stage_busy[index]));
    this.#pages.show(stats);
    const hits = stats.prompt_tokens ? stats.prompt_tokens_cached / stats.prompt_tokens : 0;
    this.#since.textContent = [
      `${count(stats.finished)} finished`,
      `${count(stats.aborted)} aborted`,
      `${count(stats.preemptions)} preempted`,
      `${count(stats.prompt_tokens)} tokens in (${count(100 * hits)} % cached)`,
      `${count(stats.output_tokens)} out`,
    ].join(" · ");
  }
}

class Stage {
  #share = element("span", { class: "share" });
  #meter;

  constructor(number, ranks) {
    this.#meter = meter(`Busy share of stage ${number}`, 100, element("i"));
    this.box = element(
      "li", { class: "stage" },
      element("p", { class: "name" }, element("b", {}, `Stage ${number}`), this.#share),
      this.#meter,
      element("p", { class: "quiet" }, layers(ranks[0].layers)),
      element("ul", { class: "ranks" }, ...ranks.map(rankItem)),
    );
  }

  // share: of the time, 0 to 1.
  show(share = 0) {
    const percent = Math.round(100 * share);
    this.#share.textContent = `${percent} % busy`;
    this.#meter.setAttribute("aria-valuenow", percent);
    this.box.style.setProperty("--share", share);
  }
}

class Pages {
  #legend = element("p", { class: "legend" });
  #meter = meter("Pages in use", 0, element("i", { class: "used" }), element("i", { class: "kept" }));

  constructor() {
    this.box = element("div", { class: "pages" }, this.#meter, this.#legend);
  }

  show({ pages, pages_used: used, pages_kept: kept }) {
    this.#meter.setAttribute("aria-valuemax", pages);
    this.#meter.setAttribute("aria-valuenow", used);
    this.#meter.style.setProperty("--used", pages ? used / pages : 0);
    this.#meter.style.setProperty("--kept", pages ? kept / pages : 0);
    this.#legend.replaceChildren(
      element("span", { class: "used" }, `${count(used)} pages used`),
      element("span", { class: "kept", title: "prefixes that nobody uses now, kept for the next prompt" }, `${count(kept)} kept`),
      element("span", {}, `of ${count(pages)}`),
    );
  }
}

function meter(label, max, ...fills) {
  const attributes = { class: "meter", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": max };
  return element("div", attributes, ...fills);
}

function rankItem({ rank, shard, stage, node, pid }) {
  return element(
    "li", { class: "rank", title: `rank ${rank}: shard ${shard} of stage ${stage}, process ${pid} on ${node}` },
    element("span", { class: "number", "aria-label": `rank ${rank}` }, String(rank)),
    element("span", { class: "node" }, node),
    element("span", { class: "quiet" }, `pid ${pid}`),
  );
}

// first, last + 1
function layers([begin, end]) {
  if (end <= begin) return "no layers";
  return end - begin === 1 ? `layer ${begin}` : `layers ${begin}–${end - 1}`;
}

// Ranks by one of their numbers, in its order.
function groups(ranks, field) {
  const found = new Map();
  for (const rank of [...ranks].sort((a, b) => a[field] - b[field] || a.shard - b.shard)) {
    found.set(rank[field], [...(found.get(rank[field]) ?? []), rank]);
  }
  return found;
}
