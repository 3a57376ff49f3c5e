// Who was doing what, when; and how far behind the learner was each worker?

import { get, post, throttled } from "../api.js";
import { LineChart, Surface } from "../chart.js";
import { card, clear, colour, duration, empty, h, percent } from "../dom.js";

// State: label, colour, and whether it is drawn as a thin line below because it goes on beside the others.
const STATES = {
  generate: ["generating", "s0"], pause: ["paused for sync", "c4"], fetch: ["fetching weights", "c5", true],
  score: ["scoring", "s1"], reference: ["reference", "s2"], step: ["learner step", "c1"], publish: ["publishing", "c2"],
  probe: ["probing", "s3"], join: ["worker joining", "s3", true], leave: ["worker leaving", "c4", true], evaluate: ["evaluating", "c6"], write: ["recording", "s4"],
};
const known = (name) => STATES[name] ?? [name, "c6"];
const FLEET = ["rollout", "reward"].flatMap((kind) => [["desired", "c6", true], ["ready", "c3"], ["restarts", "c4"]]
  .map(([what, tone, dash]) => ({ name: `workers/${kind}/${what}`, label: what, colour: tone, dash, stepped: true })));

const ROLES = ["rollout", "reward"];

// Asks the run for other numbers of workers, where whoever serves this page can reach it.
function scaler(run) {
  const said = h("span", { class: "small soft", role: "status" });
  const inputs = ROLES.map((role) => h("input", { type: "number", min: "1", step: "1", "aria-label": `${role} workers` }));
  const touched = new Set();
  for (const input of inputs) input.addEventListener("input", () => touched.add(input));
  const ask = async (event) => {
    event.preventDefault();
    // What nobody touched was filled in from a step that is over: the run may want another number by now.
    const asked = Object.fromEntries(ROLES.map((role, i) => [role, inputs[i]]).filter(([, input]) => touched.has(input) && input.value)
      .map(([role, input]) => [role, input.valueAsNumber]));
    if (!Object.keys(asked).length) { said.textContent = "Change a number first."; return; }
    try {
      await post(`runs/${run}/workers`, asked);
      said.textContent = `Asked for ${Object.entries(asked).map(([role, count]) => `${count} ${role}`).join(", ")}.`;
      touched.clear();
    } catch (error) { said.textContent = error.message; }
  };
  const form = h("form", { class: "controls", onsubmit: ask }, ROLES.map((role, i) => h("label", {}, `${role} workers`, inputs[i])), h("button", { class: "button", type: "submit" }, "Scale"), said);
  const element = card("Scale", "workers there should be; they come and go while the run trains", form);
  element.classList.add("wide");
  return { element, rows(table) { // what the run wants now, unless somebody is about to want something else
    inputs.forEach((input, i) => {
      const wanted = table.values[`workers/${ROLES[i]}/desired`].findLast((value) => value !== null);
      if (!touched.has(input) && wanted !== undefined) input.value = wanted;
    });
  } };
}

export function create({ run, runs, meaning }) {
  let view = null, from = null, to = null, follow = false, strips = [];
  const timeline = card("Timeline", "share of time in each state; drag to look closer");
  timeline.classList.add("wide");
  const controls = h("div", { class: "controls" }), legend = h("div", { class: "legend" });
  const lanes = h("div", { style: { minHeight: "150px" } });
  timeline.append(controls, legend, lanes);
  const versionPlace = h("div", {});
  let versions = null;
  const workers = ["rollout", "reward"].map((kind, i) => new LineChart({
    title: `${kind === "rollout" ? "Rollout" : "Reward"} workers`, note: "by step", range: [0, null], least: 1, meaning: (one) => meaning(one.name), series: FLEET.slice(3 * i, 3 * i + 3) }));
  const lag = new LineChart({ title: "Serving lag", note: "versions, slowest worker, by step", range: [0, null], least: 1, meaning: (one) => meaning(one.name),
    series: [{ name: "weight_sync/serving_lag_max", label: "behind the learner", colour: "c2", stepped: true }] });
  for (const chart of [...workers, lag]) chart.nothing = "This run does not report it.";

  const reload = throttled(async () => {
    view = await get(`runs/${run}/timeline`, { from: follow ? Math.max(0, (view?.duration ?? 1e9) - follow) : from, to: follow ? null : to });
    draw();
  }, 2000);
  const go = (a, b, last = false) => { from = a; to = b; follow = last; reload.now(); };
  const zoom = (factor) => {
    const middle = (view.start + view.stop) / 2, half = Math.max(0.05, (view.stop - view.start) * factor / 2);
    go(Math.max(0, middle - half), Math.min(view.duration, middle + half));
  };
  const shift = (share) => {
    const width = view.stop - view.start, start = Math.min(Math.max(0, view.start + share * width), view.duration - width);
    go(start, start + width);
  };
  const button = (text, label, act) => h("button", { class: "button", type: "button", "aria-label": label, onclick: act }, text);
  const range = h("span", { class: "small soft" });
  controls.append(
    h("span", { class: "group" }, button("whole run", "Whole run", () => go(null, null)), button("last minute", "Last minute", () => go(null, null, 60)), button("last 10 s", "Last ten seconds", () => go(null, null, 10))),
    h("span", { class: "group" }, button("◀", "Earlier", () => shift(-0.5)), button("−", "Zoom out", () => zoom(2)), button("+", "Zoom in", () => zoom(0.5)), button("▶", "Later", () => shift(0.5))), range);

  function draw() {
    strips.forEach((strip) => strip.destroy());
    strips = [];
    for (const element of controls.querySelectorAll("button")) element.disabled = !view.lanes.length;
    if (!view.lanes.length) {
      range.textContent = "";
      clear(lanes, empty("No trace recorded", runs[run].settings.trace === false ? "This run was told to write none: observability.trace=false." : "What every role did when is drawn from trace.json, which is not there or still empty.", 150));
      return;
    }
    const used = Object.keys(STATES).filter((name) => view.lanes.some((lane) => lane.states[name]));
    clear(legend, ...used.map((name) => h("span", { class: "key" }, h("span", { class: "swatch block", style: { background: `var(--${known(name)[1]})` } }), known(name)[0])), h("span", { class: "key" }, h("span", { class: "swatch block", style: { background: "var(--hover)", outline: "1px solid var(--line)" } }), "idle"));
    clear(lanes, ...view.lanes.map(lane), axis());
    range.textContent = `${duration(view.start)} to ${duration(view.stop)} of ${duration(view.duration)}`;
    drawVersions();
  }

  function lane(one) {
    const strip = new Surface({ label: `${one.name}: ${totals(one)}`, draw: (context, width, height) => drawLane(context, width, height, one), describe: (x) => describe(x, one, view),
      drag: (a, b) => go(view.start + a * (view.stop - view.start), view.start + b * (view.stop - view.start)) });
    strips.push(strip);
    return h("div", { class: "lane" }, h("span", { class: "name" }, one.name), strip.element, h("span", { class: "totals" }, totals(one)));
  }

  function axis() {
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => h("span", {}, duration(view.start + share * (view.stop - view.start))));
    return h("div", { class: "lane axis" }, h("span", {}), h("div", { class: "ticks" }, ticks), h("span", {}));
  }

  function drawVersions() {
    const lines = view.versions;
    if (!lines.length) return;
    const key = lines.map((line) => line.name).join();
    if (versions?.key !== key) {
      versions?.chart.destroy();
      const series = lines.map((line, i) => ({ label: line.learner ? "learner" : line.name, colour: line.learner ? "c1" : ["s0", "s3", "c2", "s4"][i % 4], stepped: true, width: line.learner ? 2.2 : 1.6 }));
      versions = { key, chart: new LineChart({ title: "Serving versions", note: "version of the policy, by time", x: "time", series, meaning: (s) => (s.label === "learner" ? "optimizer steps the learner has made" : "version this worker serves, from the sync that gave it") }) };
      clear(versionPlace, versions.chart.element);
    }
    const width = view.stop - view.start, count = lines[0].values.length;
    versions.chart.set(lines[0].values.map((_, i) => view.start + width * i / (count - 1)), lines.map((line) => line.values));
  }

  let seen = -1;
  const charts = [lag, ...workers], control = runs[run].acts ? scaler(run) : null;
  return {
    element: h("div", { class: "grid" }, timeline, control?.element, versionPlace, charts.map((chart) => chart.element)),
    names: charts.flatMap((chart) => chart.series.map((one) => one.name)),
    rows(tables) {
      const table = tables.get(run);
      control?.rows(table);
      for (const chart of charts) chart.set(table.step, chart.series.map((one) => table.values[one.name]));
    },
    summary(now) { if (now.events !== seen) { seen = now.events; if (!view || follow || to === null) reload.ask(); } },
    destroy() { reload.stop(); versions?.chart.destroy(); [...strips, ...charts].forEach((one) => one.destroy()); },
  };
}

const idle = (states, share) => Math.max(0, 1 - Object.entries(states).filter(([name]) => !known(name)[2]).reduce((sum, [, state]) => sum + share(state), 0));

function totals(lane) {
  const parts = Object.entries(lane.states).filter(([, state]) => state.total >= 0.0005).sort((a, b) => b[1].total - a[1].total).map(([name, state]) => `${known(name)[0]} ${percent(state.total)}`);
  return [...parts, `idle ${percent(idle(lane.states, (state) => state.total))}`].join(" · ");
}

function drawLane(context, width, height, lane) {
  const states = Object.entries(lane.states), bins = states[0][1].share.length, low = height - 4;
  const beside = states.some(([name]) => known(name)[2]);
  for (let i = 0; i < bins; i += 1) {
    const left = Math.floor(i * width / bins), wide = Math.max(1, Math.floor((i + 1) * width / bins) - left);
    let top = beside ? low - 1 : height;
    for (const [name, state] of states) {
      const share = state.share[i] / 100;
      if (!share) continue;
      context.fillStyle = colour(known(name)[1]);
      if (known(name)[2]) { context.fillRect(left, low, wide, 4 * Math.max(0.3, share)); continue; }
      const tall = Math.min(top, share * (beside ? low - 1 : height));
      context.fillRect(left, top - tall, wide, tall);
      top -= tall;
    }
  }
}

function describe(x, lane, view) {
  const bins = Object.values(lane.states)[0].share.length, i = Math.min(bins - 1, Math.max(0, Math.floor(x * bins)));
  const parts = Object.entries(lane.states).filter(([, state]) => state.share[i]).map(([name, state]) => `${known(name)[0]} ${state.share[i]}%`);
  return `${lane.name} at ${duration(view.start + (i + 0.5) / bins * (view.stop - view.start))}\n${parts.join("\n") || "idle"}`;
}
