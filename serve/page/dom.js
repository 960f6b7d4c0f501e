// Elements. What comes from the server goes through `append` and `textContent`: it is text, never markup.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const count = (number) => whole.format(number);
export const rate = (number) => (number < 100 ? fine : whole).format(number);

export function duration(ms) {
  return ms < 1000 ? `${whole.format(ms)} ms` : `${fine.format(ms / 1000)} s`;
}

export function longDuration(seconds) {
  if (seconds < 60) return `${whole.format(seconds)} s`;
  if (seconds < 3600) return `${whole.format(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${fine.format(seconds / 3600)} h`;
  return `${whole.format(seconds / 86400)} days`;
}
