// The main metrics of all runs over each other.

import { LineChart } from "../chart.js";
import { buttons, clear, h, percent, number } from "../dom.js";

const METRICS = [
  ["reward/mean", "Reward", "batch mean", [0, 1]], ["eval/accuracy", "Held-out accuracy", "greedy", [0, 1], true],
  ["staleness/mean", "Staleness", "mean, versions", [0, null]], ["importance/ess_sequence", "ESS of sequences", "fraction", [0, 1]],
  ["kl/reference_k3", "KL to the reference", "k3, nats per token, log scale", [0, null], false, true], ["policy/entropy", "Entropy", "nats", [0, null]],
  ["importance/clip_fraction", "Clip fraction", "of tokens", [0, null]], ["throughput/trained_tokens_per_s", "Trained", "tokens per second", [0, null]],
];
const COLOURS = ["c1", "c2", "c3", "c5", "c4", "c6"];

export function create({ runs, meaning }) {
  let axis = "step", tables = null, charts = [];
  const names = runs.map((run) => run.name);
  const labels = names.map((name, i) => (names.indexOf(name) === names.lastIndexOf(name) ? name : `${name} (${i + 1})`));
  const grid = h("div", { class: "grid" });
  const table = h("section", { class: "card", style: { marginBottom: "14px" } });

  function build() {
    charts.forEach((chart) => chart.destroy());
    charts = METRICS.map(([name, title, note, range, points, log]) => new LineChart({ title, note, range, log, sync: "compare", x: axis, meaning: () => meaning(name),
      series: runs.map((_, i) => ({ name, label: labels[i], colour: COLOURS[i % COLOURS.length], points, sparse: true, dash: i >= COLOURS.length })) }));
    clear(grid, ...charts.map((chart) => chart.element));
    if (tables) fill();
  }

  // Every run on its own steps or seconds; uPlot wants one axis for all of them.
  function fill() {
    METRICS.forEach(([name], m) => {
      const columns = runs.map((_, i) => {
        const one = tables.get(i), began = one.time.find((time) => time !== null) ?? 0;
        const rows = one.step.map((step, r) => [axis === "step" ? step : one.time[r] - began, one.values[name][r]]).filter(([, value]) => value !== null);
        if (axis === "time") rows.sort((a, b) => a[0] - b[0]);
        return rows;
      });
      const xs = [...new Set(columns.flatMap((rows) => rows.map(([x]) => x)))].sort((a, b) => a - b);
      charts[m].set(xs, columns.map((rows) => { const at = new Map(rows); return xs.map((x) => at.get(x) ?? null); }));
    });
  }

  function draw() {
    const last = (i) => runs[i].latest;
    const head = ["run", "phase", "step", "reward", "held-out", "staleness", "ESS", "KL"];
    clear(table, h("header", {}, h("h2", {}, "Runs"), h("span", { class: "right controls" }, "aligned by", toggle)),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Newest values of every run" }, h("table", {}, h("thead", {}, h("tr", {}, head.map((text, i) => h("th", { scope: "col", class: i > 1 ? "number" : "" }, text)))),
        h("tbody", {}, runs.map((run, i) => h("tr", {}, h("th", { scope: "row" }, h("span", { class: "swatch block", style: { background: `var(--${COLOURS[i % COLOURS.length]})`, display: "inline-block", marginRight: "8px" } }), labels[i]),
          h("td", {}, run.phase), ...[String(run.step), number(last(i)["reward/mean"]), number(run.accuracy.last), number(last(i)["staleness/mean"]), percent(last(i)["importance/ess_sequence"]), number(last(i)["kl/reference_k3"])].map((text) => h("td", { class: "number" }, text))))))));
  }

  const toggle = buttons("Aligned by", [["step", "step"], ["time", "wall time"]], axis, (chosen) => { axis = chosen; build(); });
  build();
  return {
    element: [table, grid],
    runs: runs.map((_, i) => i),
    names: METRICS.map(([name]) => name),
    rows(now) { tables = now; fill(); },
    summary: draw,
    destroy: () => charts.forEach((chart) => chart.destroy()),
  };
}
