// How old are the tokens the learner trains on, and where did they wait?

import { get, throttled } from "../api.js";
import { LineChart, Surface } from "../chart.js";
import { bucketColour, card, clear, colour, empty, h, number, percent } from "../dom.js";

const HEIGHT = 190;

export function create({ run, runs, meaning }) {
  let map = null;
  const tip = (one) => (one.name ? meaning(one.name) : one.tip);
  const parts = new LineChart({ title: "In flight and in queue", note: "mean age in versions, stacked", range: [0, null], sync: "staleness", meaning: tip, series: [
    { name: "staleness/in_flight/mean", label: "in flight", colour: "s0", fill: true },
    { name: "staleness/in_queue/mean", label: "in queue", colour: "s3", on: 0 },
    { name: "staleness/window", label: "window", colour: "c1", dash: true },
    { name: "staleness/bound", label: "bound", colour: "c4", dash: true },
  ] });
  const rejected = new LineChart({ title: "Rejected", note: "since the start", range: [0, null], least: 1, sync: "staleness", meaning: tip, series: [
    { name: "staleness/rejected_groups", label: "groups", colour: "c4" },
    { name: "ledger/rejected", label: "groups, for any reason", colour: "c6" },
  ] });
  rejected.nothing = "No rejections are reported by this run.";
  const survivors = new LineChart({ title: "Who survives", note: "mean reward of trained and rejected responses", range: [0, 1], sync: "staleness", meaning: tip, series: [
    { name: "staleness/trained_reward", label: "trained", colour: "c1" },
    { name: "staleness/rejected_reward", label: "rejected", colour: "c4" },
  ] });
  survivors.nothing = "Nothing was rejected, so nothing was selected.";
  let workers = h("section", { class: "card" }, h("header", {}, h("h2", {}, "By worker")));
  let workerChart = null;
  const heat = card("Share of trained tokens by staleness", "each column a learner step");
  heat.classList.add("wide");
  const body = heat.appendChild(h("div", { style: { minHeight: `${HEIGHT + 58}px` } }, empty("Reading the recorded tokens…", "", HEIGHT)));
  const surface = new Surface({ label: "Heat map of staleness over steps; arrow keys move along the steps", height: HEIGHT,
    draw: (context, width, height) => drawHeat(context, width, height, map), describe: (x) => describe(x, map) });
  const reload = throttled(async () => {
    map = await get(`runs/${run}/staleness`);
    drawMap();
    drawWorkers();
    if (map.waiting) reload.ask();
  }, 1500);

  function drawMap() {
    if (!map.first.length) {
      const every = runs[run].settings.rollouts_every;
      clear(body, empty(map.waiting ? "Reading the recorded tokens…" : "No rollouts recorded",
        map.waiting ? "" : every === 0 ? "This run was told to keep none: records.rollouts_every=0." : "The first recorded step will appear here.", HEIGHT));
      return;
    }
    const ages = [...Array(map.ages).keys()].reverse();
    const grid = h("div", { class: "heat" },
      h("div", { class: "ages", style: { gridTemplateRows: `repeat(${ages.length}, 1fr)` }, "aria-hidden": true }, ages.map((age) => h("span", {}, String(age)))),
      surface.element,
      h("div", { class: "ticks" }, h("span", {}, `step ${map.first[0]}`), h("span", {}, `step ${map.last[map.last.length - 1]}`)));
    const note = map.waiting ? ` ${map.waiting} of ${map.recorded} steps still to be read.` : "";
    clear(body, grid, h("p", { class: "small soft keys" }, "Rows: age in versions. Share of the step's tokens: 0", h("span", { class: "scale" }), `100%.${note}`));
    surface.rebuild();
  }

  function drawWorkers() {
    const names = Object.keys(map.workers);
    if (!names.length) return;
    if (!workerChart || workerChart.series.length !== names.length) {
      workerChart?.destroy();
      workerChart = new LineChart({ title: "By worker", note: "mean age of its tokens, versions", range: [0, null], sync: "staleness",
        meaning: (one) => one.tip, series: names.map((name, i) => ({ label: name, colour: ["c1", "c2", "c3", "c5", "c4", "c6"][i % 6], tip: "mean age of the tokens this worker sampled" })) });
      workers.replaceWith(workerChart.element);
      workers = workerChart.element;
    }
    workerChart.set(map.last, names.map((name) => map.workers[name]));
  }

  const charts = [parts, rejected, survivors];
  let seen = -1;
  return {
    element: h("div", { class: "grid" }, heat, parts.element, workers, rejected.element, survivors.element),
    names: charts.flatMap((chart) => chart.series.map((one) => one.name)),
    rows(tables) {
      const table = tables.get(run);
      for (const chart of charts) chart.set(table.step, chart.series.map((one) => table.values[one.name]));
    },
    summary(now) { if (now.recorded !== seen || now.step !== this.step) { seen = now.recorded; this.step = now.step; reload.ask(); } },
    destroy() { reload.stop(); surface.destroy(); workerChart?.destroy(); charts.forEach((chart) => chart.destroy()); },
  };
}

function drawHeat(context, width, height, map) {
  if (!map?.first.length) return;
  const columns = map.first.length, rows = map.ages;
  const gap = width / columns > 5 ? 1 : 0;
  map.shares.forEach((shares, i) => {
    const left = Math.round(i * width / columns), right = Math.round((i + 1) * width / columns);
    shares.forEach((share, age) => {
      const top = Math.round((rows - 1 - age) * height / rows), bottom = Math.round((rows - age) * height / rows);
      context.globalAlpha = share ? 0.08 + 0.92 * Math.pow(share, 0.7) : 0.035;
      context.fillStyle = colour(bucketColour(age));
      context.fillRect(left, top, Math.max(1, right - left - gap), bottom - top - 1);
    });
  });
  context.globalAlpha = 1;
}

function describe(x, map) {
  if (!map?.first.length) return null;
  const i = Math.min(map.first.length - 1, Math.max(0, Math.floor(x * map.first.length)));
  const steps = map.first[i] === map.last[i] ? `step ${map.first[i]}` : `steps ${map.first[i]} to ${map.last[i]}`;
  const ages = map.shares[i].map((share, age) => [share, age]).filter(([share]) => share > 0).map(([share, age]) => `age ${age}: ${percent(share)}`);
  return `${steps}\n${ages.join("\n")}\nin flight ${number(map.in_flight[i])}, in queue ${number(map.in_queue[i])}`;
}
