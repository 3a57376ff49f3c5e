// Is it learning, how off-policy is it, and is anything wrong?

import { LineChart } from "../chart.js";
import { card, clear, clock, h, number, percent } from "../dom.js";

const CHARTS = [
  { title: "Reward", range: [0, 1], series: [
    { name: "reward/mean", label: "batch mean", colour: "c1" },
    { name: "reward/pass_rate", label: "pass rate", colour: "c6" },
    { name: "eval/accuracy", label: "held-out, greedy", colour: "c2", points: true, sparse: true },
  ] },
  { title: "Staleness", note: "versions", range: [0, null], series: [
    { name: "staleness/mean", label: "mean", colour: "s1" },
    { name: "staleness/p95", label: "p95", colour: "s3" },
    { name: "staleness/max", label: "oldest", colour: "s4" },
    { name: "staleness/bound", label: "bound", colour: "c4", dash: true },
  ] },
  { title: "Effective sample size", note: "fraction of the batch", range: [0, 1], series: [
    { name: "importance/ess_token", label: "tokens", colour: "c1" },
    { name: "importance/ess_sequence", label: "sequences", colour: "c3" },
  ] },
  { title: "KL", note: "nats per token, log scale", log: true, series: [
    { name: "kl/reference_k3", label: "to the reference (k3)", colour: "c5" },
    { name: "importance/k3", label: "to what sampled (k3)", colour: "c2" },
  ] },
  { title: "Throughput", note: "tokens per second", range: [0, null], series: [
    { name: "throughput/generated_tokens_per_s", label: "generated", colour: "c3" },
    { name: "throughput/trained_tokens_per_s", label: "trained", colour: "c1" },
  ] },
];

const OPEN = [["waiting", "waiting", "c6"], ["in_flight", "in flight", "s0"], ["finished", "finished", "s1"], ["learning", "learning", "s3"]];
const ENDS = { trained: "trained", rejected_stale: "rejected: too old", rejected_no_signal: "rejected: no signal",
  rejected_nonfinite: "rejected: not finite", failed_rollout: "failed: rollout", failed_reward: "failed: reward" };

export function create({ meaning, runs, run }) {
  const charts = CHARTS.map((options) => new LineChart({ ...options, sync: "overview", meaning: (one) => meaning(one.name) }));
  const alarms = h("div", { class: "alarms", "aria-live": "polite" });
  const tiles = h("section", { class: "card tiles", "aria-label": "Newest values" });
  const ledger = card("Prompts", "groups as of the newest step, and how they ended");
  const history = card("Notes", "alarms and events, newest first");
  const flow = ledger.appendChild(h("div", {})), list = history.appendChild(h("div", { class: "history", tabindex: 0, role: "region", "aria-label": "Notes" }));
  const element = h("div", {}, alarms, tiles, h("div", { class: "grid" }, charts.map((c) => c.element), h("div", { class: "stack" }, ledger, history)));
  return {
    element,
    names: CHARTS.flatMap((c) => c.series.map((one) => one.name)),
    rows(tables) {
      const table = tables.get(run);
      CHARTS.forEach((c, i) => charts[i].set(table.step, c.series.map((one) => table.values[one.name])));
    },
    summary(now) {
      drawAlarms(alarms, now);
      drawTiles(tiles, now, meaning);
      drawLedger(flow, now, meaning);
      drawNotes(list, now);
    },
    destroy: () => charts.forEach((c) => c.destroy()),
  };
}

function drawAlarms(box, now) {
  if (!now.alarms.length) { clear(box, h("p", { class: "calm" }, now.step ? "No alarm stands." : "No alarm stands; no step yet.")); return; }
  clear(box, ...now.alarms.map((alarm) => h("article", { class: `alarm ${alarm.severity === "critical" ? "critical" : ""}` },
    h("h2", {}, spoken(alarm.name), h("small", {}, `${alarm.severity === "critical" ? "critical · " : ""}raised at step ${alarm.step} · ${measured(alarm)}`)),
    h("dl", {}, h("dt", {}, "Likely cause"), h("dd", {}, String(alarm.cause ?? "–")), h("dt", {}, "What to change"), h("dd", {}, String(alarm.advice ?? "–"))))));
}

// `ess_low` as a person would say it.
function spoken(name) {
  const words = String(name).replaceAll("_", " ").replace(/\bess\b/i, "ESS").replace(/\bk3\b/i, "k3");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

const measured = (alarm) => alarm.value === null || alarm.value === undefined ? "no value"
  : `${number(alarm.value)}${alarm.limit === null || alarm.limit === undefined ? "" : ` against a limit of ${number(alarm.limit)}`}`;

function drawTiles(box, now, meaning) {
  const v = now.latest;
  const tile = (title, name, value, more, over) => h("div", { class: "tile", "data-tip": meaning(name), tabindex: 0 },
    h("h2", {}, title), h("div", { class: "value" }, value), h("p", { class: over ? "over" : "" }, more));
  const small = (text) => h("small", {}, text);
  const { first, last } = now.accuracy;
  const bound = now.bound === null || now.bound === undefined ? "no bound known" : `of at most ${number(now.bound)} allowed`;
  clear(box,
    tile("Reward", "reward/mean", [number(v["reward/mean"])], `pass rate ${percent(v["reward/pass_rate"])}`),
    tile("Held-out accuracy", "eval/accuracy", [number(last)], first === null ? "not evaluated yet" : `from ${number(first)} at the start`),
    tile("Staleness, mean", "staleness/mean", [number(v["staleness/mean"], 3), small(" versions")],
      v["staleness/violations"] ? `${number(v["staleness/violations"])} tokens beyond the bound` : `p95 ${number(v["staleness/p95"])}, oldest ${number(v["staleness/max"])} ${bound}`, v["staleness/violations"] > 0),
    tile("ESS, sequences", "importance/ess_sequence", [percent(v["importance/ess_sequence"])], `tokens ${percent(v["importance/ess_token"])}`),
    tile("KL to the reference", "kl/reference_k3", [number(v["kl/reference_k3"]), small(" nats")], "per token, k3"),
    tile("Generated", "throughput/generated_tokens_per_s", [number(v["throughput/generated_tokens_per_s"]), small(" tok/s")], `trained ${number(v["throughput/trained_tokens_per_s"])} tok/s`));
}

function drawLedger(box, now, meaning) {
  const open = OPEN.map(([key, label, tone]) => ({ key, label, tone, count: now.ledger.open[key] ?? 0 }));
  const total = open.reduce((sum, one) => sum + one.count, 0);
  const ends = Object.entries(ENDS).filter(([key]) => key === "trained" || now.ledger.ends[key]);
  const others = Object.entries(now.ledger.ends).filter(([key]) => !(key in ENDS));
  const row = (label, count, tip) => h("tr", {}, h("th", { scope: "row", "data-tip": tip ?? null }, label), h("td", { class: "number" }, String(count)));
  const bar = h("div", { class: "flow", role: "img", "aria-label": `${total} open groups` },
    open.map((one) => h("span", { style: { flex: `${total ? one.count : 0} 0 0`, background: `var(--${one.tone})` } })));
  const label = (one) => h("span", {}, h("span", { class: "swatch block", style: { background: `var(--${one.tone})`, display: "inline-block", marginRight: "7px" } }), one.label);
  clear(box, bar, h("div", { class: "columns" },
    h("table", {}, h("tbody", {}, open.map((one) => row(label(one), one.count, meaning(`ledger/${one.key}`))))),
    h("table", {}, h("tbody", {}, ends.map(([key, text]) => row(text, now.ledger.ends[key] ?? 0)), others.map(([key, count]) => row(key, count)), row("lost", now.ledger.lost ?? 0, meaning("ledger/lost"))))));
}

function drawNotes(box, now) {
  const rows = [
    ...now.history.map((a) => ({ time: a.time, text: `${spoken(a.name)} ${a.state} at step ${a.step}: ${measured(a)}` })),
    ...now.notes.map((n) => ({ time: n.time, text: `${n.kind}: ${n.message}` })),
  ].sort((a, b) => b.time - a.time);
  clear(box, rows.length ? h("ul", {}, rows.map((row) => h("li", {}, h("time", {}, clock(row.time)), h("span", {}, row.text))))
    : h("p", { class: "soft small" }, "Nothing worth a note has happened."));
}
