// Elements and words. Text from runs only ever becomes text nodes, never markup.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const clear = (element, ...children) => { element.replaceChildren(...children); return element; };

export function card(title, note, ...children) {
  return h("section", { class: "card" }, h("header", {}, h("h2", {}, title), note ? h("span", { class: "note" }, note) : null), ...children);
}

export function empty(strong, text, height) {
  return h("div", { class: "empty", style: height ? { minHeight: `${height}px` } : {} }, h("strong", {}, strong), text ? h("span", {}, text) : null);
}

export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e4) return String(value).replace(/^-/, "−");
  if (size >= 1e6) return `${(value / 1e6).toFixed(2)}M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(1)}k`;
  if (size >= 100) return value.toFixed(0);
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
  const text = size >= 0.9995 ? value.toFixed(Math.max(0, digits - 1)) : value.toFixed(size < 0.1 ? digits + 1 : digits);
  return text.replace(/^-/, "−");
}

// Ticks of an axis: as short as they can be.
export function tick(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value), short = (x) => String(parseFloat(x.toPrecision(6)));
  const text = size >= 1e6 ? `${short(value / 1e6)}M` : size >= 1e4 ? `${short(value / 1e3)}k` : size !== 0 && size < 1e-3 ? value.toExponential(0).replace("e-", "e−") : short(value);
  return text.replace(/^-/, "−");
}

export const percent = (value, digits = 1) => value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}%`;

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

export const clock = (seconds) => seconds ? new Date(1000 * seconds).toLocaleTimeString([], { hour12: false }) : "";

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export const BUCKETS = ["0", "1", "2", "3", "4+"];
export const bucketColour = (age) => `s${Math.min(4, Math.max(0, age))}`;

// One bubble for everything that carries data-tip, on hover and on keyboard focus.
export function startTips() {
  const tip = document.getElementById("tip");
  const over = (event) => {
    const target = event.target.closest?.("[data-tip]");
    if (target) { target.setAttribute("aria-describedby", "tip"); showTip(target.dataset.tip, target.getBoundingClientRect()); }
  };
  document.addEventListener("mouseover", over);
  document.addEventListener("focusin", over);
  for (const kind of ["mouseout", "focusout", "scroll"]) document.addEventListener(kind, hideTip, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  tip.hidden = true;
}

export function showTip(text, box) {
  const tip = document.getElementById("tip");
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - width - 8);
  const below = box.bottom + 8 + height < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 8 : box.top - height - 8}px`;
}

export function hideTip() { document.getElementById("tip").hidden = true; }

export function buttons(label, options, chosen, choose) {
  const group = h("span", { class: "group", role: "group", "aria-label": label });
  for (const [value, text] of options) {
    group.append(h("button", {
      class: "button", type: "button", "aria-pressed": String(value === chosen),
      onclick: (event) => {
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === event.currentTarget));
        choose(value);
      },
    }, text));
  }
  return group;
}
