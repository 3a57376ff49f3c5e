// How far is the policy from what sampled, why, and what does the correction do about it?

import { get, throttled } from "../api.js";
import { LineChart, Surface } from "../chart.js";
import { BUCKETS, bucketColour, buttons, card, clear, colour, empty, h, number } from "../dom.js";

const HEIGHT = 220;
const byStaleness = (name) => BUCKETS.map((bucket, i) => ({ name: `${name}/by_staleness/${bucket}`, label: bucket, colour: bucketColour(i) }));
const PARTS = [["drift", "drift in the step", "c1"], ["lag", "policy lag", "c2"], ["engine", "engine mismatch", "c3"], ["engine_later_spans", "engine, later spans", "c5"]];
const SPLITS = [["abs_mean", "mean |·|"], ["mean", "mean"], ["k3", "k3"]];

export function create({ run, runs, meaning }) {
  const make = (title, note, range, series, nothing) => {
    const chart = new LineChart({ title, note, range, series, sync: "importance", meaning: (one) => meaning(one.name) });
    chart.nothing = nothing;
    return chart;
  };
  const charts = [
    make("ESS of tokens, by staleness", "versions behind", [0, 1], byStaleness("importance/ess_token")),
    make("ESS of sequences, by staleness", "oldest token, versions behind", [0, 1], byStaleness("importance/ess_sequence")),
    make("Clipped, masked, truncated", "fraction of tokens", [0, null], [
      { name: "importance/clip_fraction", label: "clipped", colour: "c2" }, { name: "importance/outside_fraction", label: "outside the bounds", colour: "c6" },
      { name: "importance/masked_fraction", label: "masked", colour: "c4" }, { name: "importance/truncated_fraction", label: "truncated", colour: "c5" }]),
    make("k3 by staleness", "nats per token", [0, null], byStaleness("importance/k3")),
    make("Linearization gap", "mean over responses", [0, null], [{ name: "importance/linearization_gap", label: "all", colour: "c1" }]),
    make("Log-ratio over steps", "nats", [null, null], [
      { name: "importance/log_ratio_p99", label: "99%", colour: "s4" }, { name: "importance/log_ratio_p50", label: "median", colour: "c1" }, { name: "importance/log_ratio_p01", label: "1%", colour: "s0" }]),
  ];
  const audit = make("Corrected gradient against a fresh one", "cosine; the floor is what sampling noise alone leaves", [null, 1], [
    { name: "audit/cosine", label: "cosine", colour: "c1", points: true, sparse: true }, { name: "audit/cosine_floor", label: "floor", colour: "c6", points: true, sparse: true },
    { name: "audit/norm_ratio", label: "norm ratio", colour: "c2", points: true, sparse: true }],
    "No gradient has been audited yet.");
  audit.element.classList.add("wide");
  if (runs[run].settings.audit_every) charts.push(audit); else audit.destroy();
  const split = splitChart(meaning, runs[run].settings);
  const picture = histogramCard(run, runs);
  let seen = -1;
  return {
    element: h("div", { class: "grid" }, picture.element, split.element, charts.map((chart) => chart.element)),
    names: [...charts.flatMap((chart) => chart.series.map((one) => one.name)), ...SPLITS.flatMap(([kind]) => PARTS.map(([part]) => `split/${part}/${kind}`))],
    rows(tables) {
      const table = tables.get(run);
      for (const chart of charts) chart.set(table.step, chart.series.map((one) => table.values[one.name]));
      split.rows(table);
    },
    summary(now) { if (now.recorded !== seen) { seen = now.recorded; picture.grown(); } },
    destroy() { picture.destroy(); split.destroy(); charts.forEach((chart) => chart.destroy()); },
  };
}

function splitChart(meaning, settings) {
  let kind = "abs_mean", chart = null, table = null;
  const place = h("div", {});
  const draw = () => {
    chart?.destroy();
    chart = new LineChart({ title: "Where the log-ratio comes from", note: "nats, over probed tokens", range: [kind === "mean" ? null : 0, null], sync: "importance", height: HEIGHT - 12,
      meaning: (one) => meaning(one.name), series: PARTS.map(([part, label, tone]) => ({ name: `split/${part}/${kind}`, label, colour: tone, points: true })) });
    chart.nothing = settings.probe_fraction === 0 ? "This run probes nothing: probe.fraction=0." : "No token has been probed yet.";
    chart.element.querySelector("header").append(h("span", { class: "right" }, buttons("Measure", SPLITS, kind, (chosen) => { kind = chosen; draw(); })));
    clear(place, chart.element);
    if (table) fill();
  };
  const fill = () => chart.set(table.step, chart.series.map((one) => table.values[one.name]));
  draw();
  return { element: place, rows: (now) => { table = now; fill(); }, destroy: () => chart.destroy() };
}

function histogramCard(run, runs) {
  let data = null, from, to, log = true;
  const element = card("Log-ratio of the recorded tokens", "log π_θ − log μ, by staleness");
  const start = h("input", { type: "number", min: 0, "aria-label": "First step" }), stop = h("input", { type: "number", min: 0, "aria-label": "Last step" });
  const controls = h("div", { class: "controls" }, h("label", {}, "steps", start, "to", stop),
    buttons("Counts", [[true, "log"], [false, "linear"]], log, (chosen) => { log = chosen; surface.rebuild(); }));
  const legend = h("div", { class: "legend" }, BUCKETS.map((bucket, i) => h("span", { class: "key" }, h("span", { class: "swatch block", style: { background: `var(--${bucketColour(i)})` } }), bucket)));
  const body = h("div", { style: { minHeight: `${HEIGHT}px` } }), line = h("p", { class: "small soft keys" });
  element.append(controls, legend, body, line);
  const surface = new Surface({ label: "Histogram of the log-ratio; arrow keys move along it", height: HEIGHT - 24,
    draw: (context, width, height) => drawBars(context, width, height, data, log), describe: (x) => describe(x, data) });

  const reload = throttled(async () => {
    data = await get(`runs/${run}/histogram`, { from, to });
    if (document.activeElement !== start) start.value = data.from;
    if (document.activeElement !== stop) stop.value = data.to;
    if (!data.tokens) {
      const every = runs[run].settings.rollouts_every;
      clear(body, empty("No rollouts recorded", every === 0 ? "This run was told to keep none: records.rollouts_every=0." : "No recorded step lies in this range.", HEIGHT - 40));
      line.textContent = "";
      return;
    }
    const reach = data.edges[data.edges.length - 1];
    clear(body, surface.element, h("div", { class: "ticks" }, h("span", {}, number(-reach)), h("span", {}, "0"), h("span", {}, number(reach))));
    surface.rebuild();
    line.textContent = `${data.tokens} tokens of ${data.sampled} of ${data.steps} recorded steps · mean ${number(data.mean)} · median ${number(data.quantiles.median)} · `
      + `1% ${number(data.quantiles["1%"])} · 99% ${number(data.quantiles["99%"])} · largest |·| ${number(data.largest)} · ${data.beyond} beyond the axis, counted in the outermost bars`;
  }, 4000);
  const chosen = () => {
    from = start.value === "" ? undefined : start.value;
    to = stop.value === "" ? undefined : stop.value;
    reload.now();
  };
  start.addEventListener("change", chosen);
  stop.addEventListener("change", chosen);
  return {
    element,
    grown() { if (to === undefined) reload.ask(); },
    destroy() { reload.stop(); surface.destroy(); },
  };
}

const total = (data, i) => BUCKETS.reduce((sum, bucket) => sum + data.counts[bucket][i], 0);

function drawBars(context, width, height, data, log) {
  if (!data?.tokens) return;
  const bins = data.edges.length - 1, most = Math.max(...Array.from({ length: bins }, (_, i) => total(data, i)));
  const level = (count) => height * (log ? Math.log1p(count) / Math.log1p(most) : count / most);
  context.fillStyle = colour("grid");
  context.fillRect(width / 2, 0, 1, height);
  for (let i = 0; i < bins; i += 1) {
    // On a log scale a bar's height is the log of the whole; its parts are drawn in proportion within it.
    const all = total(data, i), tall = level(all);
    let top = height;
    BUCKETS.forEach((bucket, b) => {
      const part = all ? tall * data.counts[bucket][i] / all : 0;
      context.fillStyle = colour(bucketColour(b));
      context.fillRect(i * width / bins, top - part, Math.max(1, width / bins - 1), part);
      top -= part;
    });
  }
}

function describe(x, data) {
  if (!data?.tokens) return null;
  const bins = data.edges.length - 1, i = Math.min(bins - 1, Math.max(0, Math.floor(x * bins)));
  const parts = BUCKETS.filter((bucket) => data.counts[bucket][i]).map((bucket) => `staleness ${bucket}: ${data.counts[bucket][i]}`);
  return `${number(data.edges[i])} to ${number(data.edges[i + 1])}\n${total(data, i)} tokens${parts.length ? `\n${parts.join("\n")}` : ""}`;
}
