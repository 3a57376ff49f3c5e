// Line charts (uPlot) and plain canvases, both in the page's colours and both redrawn when those change.

import { colour, h, hideTip, number, showTip, tick } from "./dom.js";

const FLOOR = 1e-7; // below this a log scale shows only noise

const charts = new Set();
document.addEventListener("themechange", () => { for (const chart of charts) chart.rebuild(); });

// A value without neighbours is no line: it is drawn as a point.
function alone(u, i) {
  const column = u.data[i], none = (place) => column[place] === null || column[place] === undefined;
  return column.flatMap((value, place) => (value !== null && none(place - 1) && none(place + 1) ? [place] : []));
}

// Powers of ten, and of those only so many as there is room for.
function decades(u, splits) {
  const powers = splits.map((value) => Math.round(Math.log10(value)));
  const every = Math.max(1, Math.ceil((Math.max(...powers) - Math.min(...powers)) / 6));
  return splits.map((value, i) => (Math.abs(Math.log10(value) - powers[i]) < 1e-9 && powers[i] % every === 0 ? value : null));
}

const FONT = '11.5px ui-sans-serif, system-ui, "DejaVu Sans", sans-serif';

// series: [{ name, label, colour, dash, points, sparse, stepped, format }]; range: [low, high] with null for free.
export class LineChart {
  constructor({ title, note, series, height = 190, range = [null, null], sync, meaning = () => "", x = "step", log = false, least = 0, format = number }) {
    Object.assign(this, { title, series, height, range, sync, x, log, least, format });
    this.data = null;
    this.hidden = new Set();
    this.keys = series.map((one, i) => this.key(one, i, meaning));
    this.legend = h("div", { class: "legend" }, this.keys.map((key) => key.element));
    this.plot = h("div", { class: "plot", style: { height: `${height}px` }, role: "img", "aria-label": title });
    this.element = h("section", { class: "card" }, h("header", {}, h("h2", {}, title), note ? h("span", { class: "note" }, note) : null), this.legend, this.plot);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.plot);
    charts.add(this);
  }

  key(one, i, meaning) {
    const tone = `var(--${one.colour})`;
    const swatch = h("span", { class: `swatch${one.dash ? " dash" : ""}`, style: { background: tone, borderColor: tone } });
    const value = h("b", {}, "–");
    const tip = meaning(one);
    const element = h("button", {
      type: "button", "aria-pressed": "true", "data-tip": tip || null,
      onclick: () => {
        this.hidden.has(i) ? this.hidden.delete(i) : this.hidden.add(i);
        element.setAttribute("aria-pressed", String(!this.hidden.has(i)));
        this.u?.setSeries(i + 1, { show: !this.hidden.has(i) });
      },
    }, swatch, one.label, value);
    return { element, value };
  }

  set(x, columns) {
    this.raw = columns;
    if (this.log) columns = columns.map((column) => column.map((value) => (value > 0 ? Math.max(value, FLOOR) : null)));
    this.data = [x, ...columns.map((column, i) => this.stacked(column, this.series[i].on))];
    const known = columns.some((column) => column.some((value) => value !== null));
    if (!this.u || !known) this.rebuild();
    else {
      const zoomed = this.zoomed();
      this.u.setData(this.data, !zoomed);
      if (zoomed) this.u.redraw();
    }
    this.values(null);
  }

  // A series that stands on another is drawn from that one's top; the legend keeps its own value.
  stacked(column, on) {
    if (on === undefined) return column;
    return column.map((value, i) => (value === null || this.raw[on][i] === null ? null : value + this.raw[on][i]));
  }

  zoomed() {
    const { min, max } = this.u.scales.x, x = this.u.data[0];
    return x.length > 1 && min !== undefined && (min > x[0] + 1e-9 || max < x[x.length - 1] - 1e-9);
  }

  values(place) {
    const words = [];
    this.series.forEach((one, i) => {
      const column = this.raw?.[i] ?? [];
      let at = place === null ? column.length - 1 : place;
      while (at >= 0 && (column[at] === null || column[at] === undefined) && (place === null || one.sparse)) at -= 1;
      const text = at >= 0 ? (one.format ?? this.format)(column[at]) : "–";
      this.keys[i].value.textContent = text;
      words.push(`${one.label} ${text}`);
    });
    if (place === null) this.plot.setAttribute("aria-label", `${this.title}: latest ${words.join(", ")}`);
  }

  resize() {
    const width = this.plot.clientWidth;
    if (this.u && width && width !== this.u.width) this.u.setSize({ width, height: this.height });
    else if (!this.u && width && this.data) this.rebuild();
  }

  rebuild() {
    const width = this.plot.clientWidth;
    if (!width || !this.data) return;
    this.u?.destroy();
    this.u = null;
    if (!this.data.slice(1).some((column) => column.some((value) => value !== null))) {
      this.plot.replaceChildren(h("div", { class: "empty", style: { height: "100%" } }, h("span", {}, this.nothing ?? "Nothing reported yet.")));
      return;
    }
    this.plot.replaceChildren();
    this.u = new uPlot(this.options(width), this.data, this.plot);
  }

  options(width) {
    const axis = { stroke: colour("faint"), font: FONT, grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false } };
    const [low, high] = this.range;
    return {
      width, height: this.height, padding: [8, 18, 0, 0],
      cursor: { sync: this.sync ? { key: this.sync } : undefined, points: { size: 6 }, y: false },
      legend: { show: false },
      scales: {
        x: { time: false },
        y: this.log ? { distr: 3 } : { range: (u, min, max) => {
          const from = low ?? min, to = Math.max(high ?? max, this.least), space = (to - from) * 0.06 || Math.abs(to) * 0.1 || 0.1;
          return [low === null ? from - space : low, high === null ? to + space : Math.max(high, max)];
        } },
      },
      axes: [
        { ...axis, size: 22, gap: 4, values: (u, ticks) => ticks.map((t) => this.x === "step" ? (Number.isInteger(t) ? String(t) : "") : `${tick(t)} s`) },
        { ...axis, size: 48, gap: 4, space: 34, values: (u, ticks) => ticks.map(tick), ...(this.log ? { filter: decades, grid: { ...axis.grid, filter: decades } } : {}) },
      ],
      series: [{}, ...this.series.map((one, i) => ({
        label: one.label, stroke: colour(one.colour), width: one.width ?? 1.7, show: !this.hidden.has(i), spanGaps: Boolean(one.sparse),
        dash: one.dash ? [5, 5] : undefined, fill: one.fill ? `${colour(one.colour)}59` : undefined, points: { show: true, size: one.points ? 6 : 4, fill: colour(one.colour), ...(one.points ? {} : { filter: alone }) },
        paths: one.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
      }))],
      bands: this.series.flatMap((one, i) => (one.on === undefined ? [] : [{ series: [i + 1, one.on + 1], fill: `${colour(one.colour)}59` }])),
      hooks: { setCursor: [(u) => this.values(u.cursor.idx ?? null)] },
    };
  }

  destroy() { charts.delete(this); this.observer.disconnect(); this.u?.destroy(); }
}

// A canvas that fills its box. `draw(context, width, height)`; `describe(x, y)` with 0..1 gives the text under the
// pointer, or under a cursor that the arrow keys move; `drag(from, to)` gets a horizontal stretch that was marked.
export class Surface {
  constructor({ label, height, draw, describe, drag }) {
    Object.assign(this, { draw, describe, at: 0.5 });
    this.canvas = h("canvas", {});
    this.element = h("div", { class: "surface", role: "img", "aria-label": label, tabindex: describe ? 0 : null, style: height ? { height: `${height}px` } : {} }, this.canvas);
    this.observer = new ResizeObserver(() => this.rebuild());
    this.observer.observe(this.element);
    if (describe) this.listen(drag);
    charts.add(this);
  }

  listen(drag) {
    const place = (event) => {
      const box = this.element.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, box];
    };
    this.element.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      this.tell(x, y, { left: event.clientX + 12, top: event.clientY - 8, bottom: event.clientY + 8 });
    });
    this.element.addEventListener("pointerleave", hideTip);
    this.element.addEventListener("blur", hideTip);
    this.element.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
      if (!move) return;
      event.preventDefault();
      this.at = Math.min(0.999, Math.max(0, this.at + move));
      const box = this.element.getBoundingClientRect(), x = box.left + this.at * box.width;
      this.tell(this.at, 0.5, { left: x, top: box.top, bottom: box.bottom });
    });
    if (!drag) return;
    this.element.addEventListener("pointerdown", (event) => { this.from = place(event)[0]; });
    this.element.addEventListener("pointerup", (event) => {
      const to = place(event)[0];
      if (this.from !== undefined && Math.abs(to - this.from) > 0.01) drag(Math.min(this.from, to), Math.max(this.from, to));
      this.from = undefined;
    });
  }

  tell(x, y, box) {
    const text = this.describe(x, y);
    if (text) showTip(text, box); else hideTip();
  }

  rebuild() {
    const width = this.element.clientWidth, height = this.element.clientHeight, scale = devicePixelRatio || 1;
    if (!width || !height) return;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    context.clearRect(0, 0, width, height);
    this.draw(context, width, height);
  }

  destroy() { charts.delete(this); this.observer.disconnect(); }
}
