// A curve of the last minute.

const WINDOW_MS = 60000;
const WIDTH = 120;
const HEIGHT = 28;

function drawing(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export class Sparkline {
  #samples = []; // [milliseconds, value]
  #line = drawing("polyline", {});
  #area = drawing("polygon", {});

  constructor() {
    // The number beside it says what a screen reader should.
    this.box = drawing("svg", {
      class: "sparkline", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true",
    });
    this.box.append(this.#area, this.#line);
  }

  add(value, now = performance.now()) {
    this.#samples = [...this.#samples.filter(([at]) => at > now - WINDOW_MS), [now, value]];
    const top = Math.max(...this.#samples.map(([, sample]) => sample), 1);
    const points = this.#samples.map(([at, sample]) => {
      const x = WIDTH * (1 - (now - at) / WINDOW_MS);
      const y = HEIGHT - 1.5 - (HEIGHT - 3) * (sample / top);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    });
    const [left] = points[0].split(",");
    this.#line.setAttribute("points", points.join(" "));
    this.#area.setAttribute("points", [`${left},${HEIGHT}`, ...points, `${WIDTH},${HEIGHT}`].join(" "));
  }
}
